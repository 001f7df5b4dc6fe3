//! The source's way to the destination.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use migrate_core::wire::Hello;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{
    net::{TcpStream, lookup_host},
    time::{Instant, timeout},
};
use tokio_rustls::TlsConnector;

use crate::{
    bootstrap::{self, Answer, Offer},
    connection::{Connection, Encrypted, remaining, same_version, version},
    error::{ChannelError, printable},
    further::{self, Further},
    ssh::SshTarget,
    tls::{self, ONE_TIME_NAME, OneTimeIdentity},
};

/// One TCP connection attempt: Linux sends four SYNs in this time.
const DIAL_LIMIT: Duration = Duration::from_secs(10);

/// Addresses of one host that are tried.
const CANDIDATES_MAX: usize = 8;

/// Longest error and advice taken over from an agent, in characters.
const REMOTE_TEXT_CHARS_MAX: usize = 1000;

/// Certificates for a standing agent, each a PEM file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The authority that signed the other side's certificate.
    pub ca: PathBuf,
    /// This side's certificate, with intermediates after it if there are any.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// What `--to` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// The agent is started by SSH.
    Ssh {
        /// User to log in as.
        user: Option<String>,
        /// Host, address, or alias in the user's SSH configuration.
        host: String,
        /// Further options for ssh's `-o`.
        options: Vec<String>,
    },
    /// A standing agent.
    Tls {
        /// Host or address, as its certificate names it.
        host: String,
        /// Its port.
        port: u16,
        /// The authority's certificate.
        ca: PathBuf,
        /// This side's certificate.
        cert: PathBuf,
        /// Its private key.
        key: PathBuf,
    },
}

impl Destination {
    /// Reads `[user@]host`, or with certificates `host:port` and `[v6]:port`.
    ///
    /// # Errors
    ///
    /// [`ChannelError::Usage`], in particular for a port without certificates
    /// and for certificates without a port.
    pub fn parse(to: &str, tls: Option<TlsFiles>) -> Result<Self, ChannelError> {
        const FORMS: &str = "write [USER@]HOST, or HOST:PORT with --ca, --cert and --key";
        let usage = |reason, help| ChannelError::Usage {
            to: printable(to, 200),
            reason,
            help,
        };
        let (user, place) = match to.rsplit_once('@') {
            Some((user, place)) => (Some(user), place),
            None => (None, to),
        };
        let (host, port) = split_port(place).ok_or_else(|| usage("malformed address", FORMS))?;
        let unfit = |text: &str| {
            text.is_empty()
                || text.starts_with('-')
                || text
                    .chars()
                    .any(|c| c.is_control() || c.is_whitespace() || "/@[]".contains(c))
        };
        if unfit(host) || user.is_some_and(unfit) {
            return Err(usage("malformed name", FORMS));
        }
        match (port, tls) {
            (None, None) => Ok(Self::Ssh {
                user: user.map(str::to_owned),
                host: host.to_owned(),
                options: Vec::new(),
            }),
            (None, Some(_)) => Err(usage(
                "certificates are for a standing agent, whose port is missing",
                "write HOST:PORT, or leave out --ca, --cert and --key to go by SSH",
            )),
            (Some(_), None) => Err(usage(
                "a port means a standing agent, which needs certificates",
                "add --ca, --cert and --key; to go by SSH leave the port out (an SSH port other than 22 belongs in ~/.ssh/config)",
            )),
            (Some(_), Some(_)) if user.is_some() => Err(usage(
                "a standing agent has no users",
                "leave out USER@, or leave out the port and the certificates to go by SSH",
            )),
            (Some(port), Some(TlsFiles { ca, cert, key })) => {
                let port = port
                    .parse()
                    .ok()
                    .filter(|port| *port != 0)
                    .ok_or_else(|| usage("the port is no number from 1 to 65535", FORMS))?;
                Ok(Self::Tls {
                    host: host.to_owned(),
                    port,
                    ca,
                    cert,
                    key,
                })
            }
        }
    }
}

/// Host and port; two colons and no brackets are an IPv6 address without one.
fn split_port(place: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = place.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        return match rest.strip_prefix(':') {
            Some(port) => Some((host, Some(port))),
            None => rest.is_empty().then_some((host, None)),
        };
    }
    match place.split_once(':') {
        Some((host, port)) if !port.contains(':') => Some((host, Some(port))),
        _ => Some((place, None)),
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ssh { user, host, .. } => match user {
                Some(user) => write!(f, "{user}@{host}"),
                None => f.write_str(host),
            },
            Self::Tls { host, port, .. } => f.write_str(&host_and_port(host, *port)),
        }
    }
}

fn host_and_port(host: &str, port: u16) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

/// Reaches the agent on the destination, within `deadline` for everything.
///
/// `hello` introduces this side; it names the migration.
///
/// # Errors
///
/// See [`ChannelError`]; [`ChannelError::help`] has the way out.
pub async fn connect(
    destination: &Destination,
    hello: Hello,
    deadline: Duration,
) -> Result<Connection, ChannelError> {
    let ends_at = Instant::now() + deadline;
    match destination {
        Destination::Ssh {
            user,
            host,
            options,
        } => {
            let target = SshTarget {
                user: user.as_deref(),
                host,
                options,
            };
            connect_by_ssh(&target, hello, ends_at).await
        }
        Destination::Tls {
            host,
            port,
            ca,
            cert,
            key,
        } => {
            let config = tls::client_from_files(&TlsFiles {
                ca: ca.clone(),
                cert: cert.clone(),
                key: key.clone(),
            })?;
            connect_to_standing(host, *port, config, hello, ends_at).await
        }
    }
}

async fn connect_by_ssh(
    target: &SshTarget<'_>,
    hello: Hello,
    ends_at: Instant,
) -> Result<Connection, ChannelError> {
    const ANSWER: &str = "answer of the agent";
    let identity = OneTimeIdentity::generate()?;
    let offer = Offer {
        protocol: hello.protocol,
        release: hello.release.clone(),
        certificate: bootstrap::encode_certificate(&identity.certificate),
    };
    let offer = bootstrap::line(&offer, "offer to the agent")?;
    let (session, line) = target.start_agent(&offer, ends_at).await?;
    let theirs = bootstrap::version(&line, ANSWER)?;
    same_version(&target.name(), version(&hello), theirs)?;
    let answer: Answer = bootstrap::parse(&line, ANSWER)?;
    if let Some(message) = answer.error {
        return Err(ChannelError::AgentRefused {
            host: target.name(),
            message: printable(&message, REMOTE_TEXT_CHARS_MAX),
            help: answer.help.map(|h| printable(&h, REMOTE_TEXT_CHARS_MAX)),
        });
    }
    let config = identity.client(bootstrap::decode_certificate(&answer.certificate)?)?;
    let tcp = dial_beside_ssh(target, &answer.addresses, ends_at).await?;
    let name = ServerName::try_from(ONE_TIME_NAME).map_err(|error| ChannelError::TlsSetup {
        source: Box::new(error),
    })?;
    let mut connection = shake_hands(tcp, name, config, hello, ends_at).await?;
    connection.ssh = Some(session);
    Ok(connection)
}

/// Tries where the agent listens as it sees itself, and then, for a host
/// behind address translation, where ssh found it.
async fn dial_beside_ssh(
    target: &SshTarget<'_>,
    addresses: &[SocketAddr],
    ends_at: Instant,
) -> Result<TcpStream, ChannelError> {
    let Some(first) = addresses.first() else {
        return Err(ChannelError::Bootstrap {
            what: "answer of the agent: it names no address",
            source: None,
        });
    };
    let known: Vec<_> = addresses.iter().copied().take(CANDIDATES_MAX).collect();
    let failed = match dial(&known, ends_at).await {
        Ok(tcp) => return Ok(tcp),
        Err(source) => source,
    };
    if let Some(host) = target.configured_host(ends_at).await
        && let Ok(others) = resolve(&host, first.port(), ends_at).await
    {
        let others: Vec<_> = others.into_iter().filter(|a| !known.contains(a)).collect();
        if let Ok(tcp) = dial(&others, ends_at).await {
            return Ok(tcp);
        }
    }
    Err(ChannelError::DirectUnreachable {
        address: first.to_string(),
        beside_ssh: true,
        source: failed,
    })
}

async fn connect_to_standing(
    host: &str,
    port: u16,
    config: Arc<ClientConfig>,
    hello: Hello,
    ends_at: Instant,
) -> Result<Connection, ChannelError> {
    let addresses =
        resolve(host, port, ends_at)
            .await
            .map_err(|error| ChannelError::NameNotResolved {
                host: host.to_owned(),
                detail: error.to_string(),
            })?;
    let tcp =
        dial(&addresses, ends_at)
            .await
            .map_err(|source| ChannelError::DirectUnreachable {
                address: host_and_port(host, port),
                beside_ssh: false,
                source,
            })?;
    // A zone is this host's business; no certificate names it.
    let bare = host.split_once('%').map_or(host, |(address, _)| address);
    let name =
        ServerName::try_from(bare.to_owned()).map_err(|_| ChannelError::NameNotResolved {
            host: host.to_owned(),
            detail: "no certificate can name it".into(),
        })?;
    shake_hands(tcp, name, config, hello, ends_at).await
}

async fn resolve(host: &str, port: u16, ends_at: Instant) -> io::Result<Vec<SocketAddr>> {
    let found = timeout(remaining(ends_at), lookup_host((host, port))).await??;
    Ok(found.take(CANDIDATES_MAX).collect())
}

/// Connects to the first address that answers; the error is the last one's.
async fn dial(addresses: &[SocketAddr], ends_at: Instant) -> io::Result<TcpStream> {
    let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in addresses {
        if needs_zone(address) {
            continue;
        }
        let limit = remaining(ends_at).min(DIAL_LIMIT);
        match timeout(limit, TcpStream::connect(address)).await {
            Ok(Ok(tcp)) => return Ok(tcp),
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

/// A link-local address without a zone leads nowhere.
fn needs_zone(address: &SocketAddr) -> bool {
    matches!((address, address.ip()), (SocketAddr::V6(v6), IpAddr::V6(ip))
        if ip.is_unicast_link_local() && v6.scope_id() == 0)
}

pub(crate) async fn shake_hands(
    tcp: TcpStream,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
    hello: Hello,
    ends_at: Instant,
) -> Result<Connection, ChannelError> {
    let stream = encrypt(tcp, name.clone(), Arc::clone(&config), ends_at).await?;
    let tokens = further::tokens(&stream)?;
    Connection::introduce(stream, hello, ends_at, |peer, address| {
        Further::dial(peer, tokens, address, name, config)
    })
    .await
}

/// TLS as its client.
pub(crate) async fn encrypt(
    tcp: TcpStream,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
    ends_at: Instant,
) -> Result<Encrypted, ChannelError> {
    let peer = tcp
        .peer_addr()
        .map_or_else(|_| "the agent".to_owned(), |address| address.to_string());
    let waited = remaining(ends_at);
    tcp.set_nodelay(true)
        .map_err(|source| ChannelError::from_stream(&peer, source))?;
    match timeout(waited, TlsConnector::from(config).connect(name, tcp)).await {
        Ok(Ok(stream)) => Ok(stream.into()),
        Ok(Err(source)) => Err(ChannelError::Handshake { peer, source }),
        Err(_) => Err(ChannelError::Deadline {
            awaited: format!("the TLS handshake with {peer}"),
            waited,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> Option<TlsFiles> {
        Some(TlsFiles {
            ca: "ca".into(),
            cert: "cert".into(),
            key: "key".into(),
        })
    }

    #[test]
    fn destinations_as_people_write_them() {
        for (to, tls, shown) in [
            ("host2", None, "host2"),
            ("root@host2", None, "root@host2"),
            ("a@b@host2", None, ""),
            ("::1", None, "::1"),
            ("[::1]", None, "::1"),
            ("root@fe80::1%eth0", None, "root@fe80::1%eth0"),
            ("host2:7000", files(), "host2:7000"),
            ("10.0.0.2:7000", files(), "10.0.0.2:7000"),
            ("[2001:db8::1]:7000", files(), "[2001:db8::1]:7000"),
        ] {
            match Destination::parse(to, tls) {
                Ok(parsed) => assert_eq!(parsed.to_string(), shown),
                Err(error) => assert!(shown.is_empty(), "{to}: {error}"),
            }
        }
    }

    #[test]
    fn what_is_no_destination_is_refused_with_the_way_out() {
        for (to, tls) in [
            ("", None),
            ("@host2", None),
            ("-oProxyCommand=id", None),
            ("root@-oProxyCommand=id", None),
            ("-x@host2", None),
            ("host 2", None),
            ("host2\n", None),
            ("[::1", None),
            ("[::1]x", None),
            ("host2:7000", None),
            ("host2", files()),
            ("root@host2:7000", files()),
            ("host2:0", files()),
            ("host2:70000", files()),
            ("host2:", files()),
            (":7000", files()),
        ] {
            let error = Destination::parse(to, tls).unwrap_err();
            assert!(matches!(error, ChannelError::Usage { .. }), "{to}");
            assert!(error.help().is_some(), "{to}");
        }
        let error = Destination::parse("host2:7000", None).unwrap_err();
        assert!(error.to_string().contains("certificates"));
        assert!(error.help().is_some_and(|help| help.contains("--ca")));
    }
}
