//! Everything that can go wrong on the way to the other host.

use std::os::unix::process::ExitStatusExt as _;
use std::{fmt, io, path::PathBuf, process::ExitStatus, time::Duration};

use migrate_core::wire::FrameError;
use rustls::{AlertDescription, CertificateError};
use thiserror::Error;

/// What a side says about its own version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerVersion {
    /// Version of the protocol.
    pub protocol: u32,
    /// Release of `migrate`.
    pub release: String,
}

impl fmt::Display for PeerVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "release {} (protocol {})",
            printable(&self.release, 64),
            self.protocol
        )
    }
}

/// A failure of the channel.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The destination as the user wrote it makes no sense.
    #[error("`{to}` is no destination: {reason}")]
    Usage {
        /// What the user wrote.
        to: String,
        /// What is wrong with it.
        reason: &'static str,
        /// What to write instead.
        help: &'static str,
    },
    /// A file with a certificate or a key could not be read.
    #[error("could not read the {what} {}", path.display())]
    ReadCredentials {
        /// Which file it is.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file holds no certificate or key.
    #[error("no usable {what} in {}", path.display())]
    ParseCredentials {
        /// Which file it is.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Certificate and key do not fit, or the authority is unusable.
    #[error("could not set up TLS")]
    TlsSetup {
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The system's `ssh` did not start.
    #[error("could not start ssh")]
    StartSsh {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host's name means nothing here.
    #[error("could not resolve the host name {host}{}", quoted(detail))]
    NameNotResolved {
        /// The name.
        host: String,
        /// What was reported.
        detail: String,
    },
    /// No route, or no answer.
    #[error("{host} cannot be reached{}", quoted(detail))]
    HostUnreachable {
        /// The host.
        host: String,
        /// What ssh said.
        detail: String,
    },
    /// Nobody listens on the SSH port.
    #[error("{host} refused the SSH connection{}", quoted(detail))]
    SshRefused {
        /// The host.
        host: String,
        /// What ssh said.
        detail: String,
    },
    /// The host's key has never been accepted here.
    #[error("the SSH host key of {host} is not known here{}", quoted(detail))]
    HostKeyUnknown {
        /// The host.
        host: String,
        /// What ssh said.
        detail: String,
    },
    /// The host's key is not the one that was accepted before.
    #[error("the SSH host key of {host} has changed{}", quoted(detail))]
    HostKeyChanged {
        /// The host.
        host: String,
        /// What ssh said.
        detail: String,
    },
    /// The host does not let this user in.
    #[error("{host} denied the SSH login{}", quoted(detail))]
    PermissionDenied {
        /// The host.
        host: String,
        /// What ssh said.
        detail: String,
    },
    /// There is no `migrate` on the path of the other side.
    #[error("`{command}` was not found on {host}{}", quoted(detail))]
    NotInstalled {
        /// The host.
        host: String,
        /// What was to be run.
        command: String,
        /// What the shell said.
        detail: String,
    },
    /// ssh ended in a way that none of the others describes.
    #[error("ssh to {host} ended with {status}{}", quoted(detail))]
    SshEnded {
        /// The host.
        host: String,
        /// How it ended.
        status: ExitStatus,
        /// What ssh said.
        detail: String,
    },
    /// The remote command ended without an answer.
    #[error(
        "the agent on {host} ended with {status} before it answered{}",
        quoted(detail)
    )]
    AgentEnded {
        /// The host.
        host: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said on standard error and output.
        detail: String,
    },
    /// The other side's login prints without end.
    #[error(
        "{host} printed more than {limit} bytes before the agent's answer{}",
        quoted(detail)
    )]
    TooMuchOutput {
        /// The host.
        host: String,
        /// The bound in bytes.
        limit: usize,
        /// The beginning.
        detail: String,
    },
    /// The agent answered that it cannot serve.
    #[error("the agent on {host} could not start: {message}")]
    AgentRefused {
        /// The host.
        host: String,
        /// Its reason.
        message: String,
        /// Its advice.
        help: Option<String>,
    },
    /// A line of the bootstrap is not what this release writes.
    #[error("malformed {what}")]
    Bootstrap {
        /// Which line.
        what: &'static str,
        /// Why.
        #[source]
        source: Option<serde_json::Error>,
    },
    /// The other side went away before it had sent its line.
    #[error("standard input ended before {awaited}")]
    SourceGone {
        /// What was awaited.
        awaited: &'static str,
    },
    /// `migrate agent --stdio` was not started by SSH.
    #[error("SSH_CONNECTION is not set, so there is no address to listen on")]
    NotUnderSsh,
    /// The two sides are not the same `migrate`.
    #[error("{peer} runs migrate {theirs}, this side runs {ours}")]
    Version {
        /// The other side.
        peer: String,
        /// This side's version.
        ours: PeerVersion,
        /// The other side's version.
        theirs: PeerVersion,
    },
    /// The TCP connection beside SSH, or to a standing agent, was not made.
    #[error("could not connect to {address}")]
    DirectUnreachable {
        /// Address and port.
        address: String,
        /// The agent there was reached by SSH a moment ago.
        beside_ssh: bool,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No TLS session with this peer.
    #[error("TLS handshake with {peer} failed")]
    Handshake {
        /// The other side.
        peer: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something did not happen in time.
    #[error("gave up after {} ms of waiting for {awaited}", waited.as_millis())]
    Deadline {
        /// What was awaited.
        awaited: String,
        /// For how long.
        waited: Duration,
    },
    /// The other side closed the connection between two frames.
    #[error("{peer} closed the connection")]
    Closed {
        /// The other side.
        peer: String,
    },
    /// The other side closed the connection inside a frame.
    #[error("{peer} closed the connection in the middle of a frame")]
    Truncated {
        /// The other side.
        peer: String,
    },
    /// The connection broke.
    #[error("lost the connection to {peer}")]
    Lost {
        /// The other side.
        peer: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A frame that this protocol does not have.
    #[error("bad frame {direction} {peer}")]
    Frame {
        /// `from` or `to`.
        direction: &'static str,
        /// The other side.
        peer: String,
        /// Why.
        #[source]
        source: FrameError,
    },
    /// A control body that is no message.
    #[error("bad message {direction} {peer}")]
    Message {
        /// `from` or `to`.
        direction: &'static str,
        /// The other side.
        peer: String,
        /// Why.
        #[source]
        source: postcard::Error,
    },
    /// A frame that has no place here.
    #[error("{peer} sent {got} where {wanted} was due")]
    Unexpected {
        /// The other side.
        peer: String,
        /// What came.
        got: &'static str,
        /// What should have come.
        wanted: &'static str,
    },
    /// An earlier call was cancelled or failed while a frame was half written.
    #[error("the connection to {peer} ends in half a frame")]
    HalfWritten {
        /// The other side.
        peer: String,
    },
    /// The agent could not listen.
    #[error("could not listen on {address}")]
    Listen {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The agent could not accept.
    #[error("could not accept a connection on {address}")]
    Accept {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A local call failed.
    #[error("could not {attempt}")]
    Local {
        /// What was tried.
        attempt: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl ChannelError {
    /// Whether a signal ended ssh: it may be one to this program's whole process group,
    /// which ssh is of for the first moment.
    #[must_use]
    pub fn is_by_signal(&self) -> bool {
        matches!(self, Self::SshEnded { status, .. } if status.signal().is_some())
    }

    /// What the user can do about it.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        let text = match self {
            Self::Usage { help, .. } => (*help).into(),
            Self::ReadCredentials { what, .. } | Self::ParseCredentials { what, .. } => {
                format!("the {what} must be a readable PEM file")
            }
            Self::TlsSetup { .. } => {
                "check that --key is the key of --cert, and that --ca is the authority's certificate".into()
            }
            Self::StartSsh { .. } => "install the OpenSSH client".into(),
            Self::NameNotResolved { host, .. } => {
                format!("check the spelling of `{host}`, or give its address")
            }
            Self::HostUnreachable { host, .. } => {
                format!("check that {host} is up and that its SSH port is not filtered: `ssh {host} true`")
            }
            Self::SshRefused { host, .. } => format!(
                "start sshd on {host}, or name its port in ~/.ssh/config, or run `migrate agent` there and use --to {host}:PORT"
            ),
            Self::HostKeyUnknown { host, .. } => {
                format!("log in once with `ssh {host}` as the same user, check the key and accept it")
            }
            Self::HostKeyChanged { host, .. } => format!(
                "make sure that it is the right machine, then remove the old key with `ssh-keygen -R {host}`"
            ),
            Self::PermissionDenied { host, .. } => format!(
                "`ssh {host} true` must work without a password: add this user's key to authorized_keys there, or name the user as user@{host}"
            ),
            Self::NotInstalled { host, .. } => format!(
                "install the same release of migrate on {host}, or set {} to where it is there",
                crate::REMOTE_COMMAND_VARIABLE
            ),
            Self::SshEnded { host, .. } => format!("try `ssh {host} true`"),
            Self::AgentEnded { host, .. } => {
                format!("try `ssh {host} migrate --version`; both hosts need the same release")
            }
            Self::TooMuchOutput { host, .. } => {
                format!("keep the shell start-up files on {host} silent when there is no terminal")
            }
            Self::AgentRefused { help, .. } => return help.clone(),
            Self::NotUnderSsh => {
                "`migrate agent --stdio` is started by migrate itself; run `migrate agent --listen ADDRESS:PORT` instead".into()
            }
            Self::Version { .. } | Self::Bootstrap { .. } | Self::Message { .. } => {
                "install the same release of migrate on both hosts".into()
            }
            Self::DirectUnreachable { address, beside_ssh: true, .. } => format!(
                "a firewall between the hosts seems to block {address}: let the source reach the destination's ephemeral ports, or run `migrate agent` on a port that is open and use --to HOST:PORT"
            ),
            Self::DirectUnreachable { address, source, .. }
                if source.kind() == io::ErrorKind::ConnectionRefused =>
            {
                format!("nothing listens on {address}: start `migrate agent` there")
            }
            Self::DirectUnreachable { address, .. } => {
                format!("check that the host is up and that no firewall blocks {address}")
            }
            Self::Handshake { source, .. } => return handshake_help(source),
            Self::Deadline { .. } => {
                "check the load of both hosts and the network between them, then try again".into()
            }
            Self::Listen { source, .. } => match source.kind() {
                io::ErrorKind::AddrInUse => "another process has this port; choose another".into(),
                io::ErrorKind::AddrNotAvailable => "this host does not have that address".into(),
                io::ErrorKind::PermissionDenied => {
                    "ports below 1024 need root; choose a higher one".into()
                }
                _ => return None,
            },
            Self::SourceGone { .. }
            | Self::Closed { .. }
            | Self::Truncated { .. }
            | Self::Lost { .. }
            | Self::Frame { .. }
            | Self::Unexpected { .. }
            | Self::HalfWritten { .. }
            | Self::Accept { .. }
            | Self::Local { .. } => return None,
        };
        Some(text)
    }

    /// The other side is gone, as opposed to slow or wrong.
    #[must_use]
    pub fn is_disconnect(&self) -> bool {
        matches!(
            self,
            Self::Closed { .. } | Self::Truncated { .. } | Self::Lost { .. }
        )
    }

    /// The other side did not answer in time.
    #[must_use]
    pub fn is_deadline(&self) -> bool {
        matches!(self, Self::Deadline { .. })
    }

    /// Sorts a failed read or write: in TLS 1.3 the server's verdict on the
    /// client's certificate arrives after the client's handshake is over.
    pub(crate) fn from_stream(peer: &str, source: io::Error) -> Self {
        let peer = peer.to_owned();
        if tls_error(&source).is_some() {
            Self::Handshake { peer, source }
        } else {
            Self::Lost { peer, source }
        }
    }
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

fn handshake_help(error: &io::Error) -> Option<String> {
    use rustls::Error as Tls;
    let text = match tls_error(error)? {
        Tls::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "its certificate is not signed by the authority given with --ca"
        }
        Tls::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => {
            "its certificate does not name the host as it was given with --to; use the name in the certificate"
        }
        Tls::InvalidCertificate(
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. },
        ) => "its certificate is not valid now; renew it, or check both clocks",
        Tls::InvalidCertificate(_) => {
            "it is not the host that was asked for, something sits in between, or its certificate is of another authority than the one given with --ca"
        }
        Tls::NoCertificatesPresented => {
            "the other side must present a certificate: --ca --cert --key"
        }
        Tls::AlertReceived(
            AlertDescription::UnknownCA
            | AlertDescription::CertificateRequired
            | AlertDescription::CertificateUnknown
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateExpired
            | AlertDescription::DecryptError
            | AlertDescription::AccessDenied,
        ) => {
            "it refused our certificate; both must be signed by the authority the other one was given"
        }
        Tls::AlertReceived(AlertDescription::ProtocolVersion) | Tls::PeerIncompatible(_) => {
            "it does not speak TLS 1.3; is this the port of a migrate agent?"
        }
        Tls::AlertReceived(AlertDescription::NoApplicationProtocol)
        | Tls::NoApplicationProtocol
        | Tls::InvalidMessage(_) => "is this the port of a migrate agent?",
        _ => return None,
    };
    Some(text.into())
}

/// A quotation of another program, or nothing when it said nothing.
fn quoted(detail: &str) -> String {
    if detail.is_empty() {
        String::new()
    } else {
        format!(" ({detail})")
    }
}

/// Foreign text made fit for one line of a terminal: no control characters,
/// at most `limit` characters.
pub(crate) fn printable(text: &str, limit: usize) -> String {
    let mut out = String::new();
    for part in text.split(|c: char| c.is_control()).map(str::trim) {
        if part.is_empty() {
            continue;
        }
        if !out.is_empty() {
            out.push_str("; ");
        }
        out.push_str(part);
    }
    if out.chars().count() > limit {
        out = out.chars().take(limit).collect();
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_stays_on_one_line_and_harmless() {
        assert_eq!(printable("a\r\nb\x1b[31m\0", 80), "a; b; [31m");
        assert_eq!(printable(&"x".repeat(100), 3), "xxx…");
        assert_eq!(printable("\n\n", 3), "");
    }
}
