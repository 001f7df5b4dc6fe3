//! A connection after TLS and before the first message of a migration.

use std::{fmt, net::SocketAddr, time::Duration};

use migrate_core::wire::{Hello, ImagePiece, Message, PageRun};
use tokio::{
    io::{ReadHalf, WriteHalf, split},
    net::TcpStream,
    time::Instant,
};
use tokio_rustls::TlsStream;

use crate::{
    error::{ChannelError, PeerVersion, printable},
    frame::{Frame, FrameReader, FrameWriter},
    ssh::SshSession,
};

/// Longest host name that is repeated to the user (`HOST_NAME_MAX` of Linux).
const HOSTNAME_CHARS_MAX: usize = 64;

/// Who is on the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its `uname -n`, made printable.
    pub hostname: String,
    /// Where it is.
    pub address: SocketAddr,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.hostname, self.address)
    }
}

/// An encrypted connection between two sides of the same version that have
/// introduced themselves.
#[derive(Debug)]
pub struct Connection {
    /// Towards the peer.
    pub sender: Sender,
    /// From the peer.
    pub receiver: Receiver,
    /// Who the peer is, for messages.
    pub peer: Peer,
    /// How the peer introduced itself.
    pub hello: Hello,
    /// This end's address.
    pub local_addr: SocketAddr,
    /// The peer's address.
    pub peer_addr: SocketAddr,
    /// On a source that came by SSH: the SSH session, which ends when this is
    /// dropped. The agent does not need it any longer, but its standard error
    /// comes through it.
    pub ssh: Option<SshSession>,
}

/// The sending half.
///
/// Every call fails with [`ChannelError::Deadline`] when the peer takes
/// nothing for the stall limit. A call that was cancelled or failed may leave
/// half a frame behind; every later call then fails with
/// [`ChannelError::HalfWritten`], and what is left is [`Sender::close`], which
/// tells the peer as much as a message would.
pub struct Sender(FrameWriter<WriteHalf<TlsStream<TcpStream>>>);

impl Sender {
    /// Sends a message at once, with everything gathered before it.
    ///
    /// # Errors
    ///
    /// Too large, stalled, or disconnected.
    pub async fn control(&mut self, message: &Message) -> Result<(), ChannelError> {
        self.0.control(message).await
    }

    /// Sends pages; a run larger than a frame goes out as several runs. May
    /// be held back until [`Self::flush`] or the next message.
    ///
    /// # Errors
    ///
    /// `data` is not what `run` announces, stalled, or disconnected.
    pub async fn pages(&mut self, run: &PageRun, data: &[u8]) -> Result<(), ChannelError> {
        self.0.pages(run, data).await
    }

    /// Sends a piece of an image; one larger than a frame goes out as several
    /// pieces. May be held back until [`Self::flush`] or the next message.
    ///
    /// # Errors
    ///
    /// A name that is no image's, stalled, or disconnected.
    pub async fn image(&mut self, piece: ImagePiece<'_>) -> Result<(), ChannelError> {
        self.0.image(piece).await
    }

    /// Sends a packet that was held for the tree. May be gathered until
    /// [`Self::flush`] or the next message.
    ///
    /// # Errors
    ///
    /// Too large, stalled, or disconnected.
    pub async fn packet(&mut self, packet: &[u8]) -> Result<(), ChannelError> {
        self.0.packet(packet).await
    }

    /// Sends what was held back.
    ///
    /// # Errors
    ///
    /// Stalled or disconnected.
    pub async fn flush(&mut self) -> Result<(), ChannelError> {
        self.0.flush().await
    }

    /// Sends what was held back and ends this direction, so that the peer
    /// sees a regular end.
    ///
    /// # Errors
    ///
    /// Stalled or disconnected.
    pub async fn close(&mut self) -> Result<(), ChannelError> {
        self.0.close().await
    }

    /// Sets how long the peer may take nothing; [`crate::STALL_LIMIT`] at first.
    pub fn set_deadline(&mut self, stall_limit: Duration) {
        self.0.set_stall_limit(stall_limit);
    }

    /// Bytes sent so far, frame headers included, TLS's own not.
    #[must_use]
    pub fn sent_bytes(&self) -> u64 {
        self.0.sent_bytes()
    }
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender")
            .field("sent_bytes", &self.sent_bytes())
            .finish_non_exhaustive()
    }
}

/// The receiving half. Calls may be cancelled: nothing is lost.
pub struct Receiver(FrameReader<ReadHalf<TlsStream<TcpStream>>>);

impl Receiver {
    /// Waits for the next frame.
    ///
    /// # Errors
    ///
    /// No complete frame within `deadline`, an illegal frame, or disconnected.
    pub async fn next(&mut self, deadline: Duration) -> Result<Frame, ChannelError> {
        self.0.next(deadline).await
    }

    /// Waits for the next message. `Abort` and `Failed` are messages, too.
    ///
    /// # Errors
    ///
    /// As [`Self::next`]; pages or images here are [`ChannelError::Unexpected`].
    pub async fn control(&mut self, deadline: Duration) -> Result<Message, ChannelError> {
        self.0.control(deadline).await
    }

    /// Bytes received so far, frame headers included, TLS's own not.
    #[must_use]
    pub fn received_bytes(&self) -> u64 {
        self.0.received_bytes()
    }
}

impl fmt::Debug for Receiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver")
            .field("received_bytes", &self.received_bytes())
            .finish_non_exhaustive()
    }
}

/// Which side speaks first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Source,
    Destination,
}

impl Connection {
    /// Introduces both sides to each other.
    ///
    /// The destination answers before it judges, so that both sides can name
    /// both versions. A destination that has no migration of its own to name
    /// takes the source's identifier.
    pub(crate) async fn introduce(
        stream: TlsStream<TcpStream>,
        role: Role,
        hello: Hello,
        ends_at: Instant,
    ) -> Result<Self, ChannelError> {
        let (tcp, _) = stream.get_ref();
        let addresses = tcp.local_addr().and_then(|l| Ok((l, tcp.peer_addr()?)));
        let (local_addr, peer_addr) = addresses.map_err(|source| ChannelError::Local {
            attempt: "read the addresses of a connection",
            source,
        })?;
        let name = peer_addr.to_string();
        let (read, write) = split(stream);
        let mut reader = FrameReader::new(read, name.clone());
        let mut writer = FrameWriter::new(write, name.clone());
        let theirs = introduce(&mut reader, &mut writer, &name, role, hello, ends_at).await?;
        Ok(Self {
            sender: Sender(writer),
            receiver: Receiver(reader),
            peer: Peer {
                hostname: printable(&theirs.hostname, HOSTNAME_CHARS_MAX),
                address: peer_addr,
            },
            hello: theirs,
            local_addr,
            peer_addr,
            ssh: None,
        })
    }
}

pub(crate) async fn introduce<R, W>(
    reader: &mut FrameReader<R>,
    writer: &mut FrameWriter<W>,
    peer: &str,
    role: Role,
    mut hello: Hello,
    ends_at: Instant,
) -> Result<Hello, ChannelError>
where
    R: tokio::io::AsyncRead + Unpin,
    W: tokio::io::AsyncWrite + Unpin,
{
    let ours = version(&hello);
    let theirs = match role {
        Role::Source => {
            writer.control(&Message::Hello(hello)).await?;
            receive_hello(reader, peer, ends_at).await?
        }
        Role::Destination => {
            let theirs = receive_hello(reader, peer, ends_at).await?;
            if hello.migration_id.is_empty() {
                hello.migration_id.clone_from(&theirs.migration_id);
            }
            writer.control(&Message::Hello(hello)).await?;
            theirs
        }
    };
    same_version(peer, ours, version(&theirs))?;
    Ok(theirs)
}

async fn receive_hello<R: tokio::io::AsyncRead + Unpin>(
    reader: &mut FrameReader<R>,
    peer: &str,
    ends_at: Instant,
) -> Result<Hello, ChannelError> {
    match reader.control(remaining(ends_at)).await {
        Ok(Message::Hello(theirs)) => Ok(theirs),
        Ok(_) => Err(ChannelError::Unexpected {
            peer: peer.to_owned(),
            got: "another message",
            wanted: "its introduction",
        }),
        Err(ChannelError::Deadline { waited, .. }) => Err(ChannelError::Deadline {
            awaited: format!("{peer} to introduce itself"),
            waited,
        }),
        Err(error) => Err(error),
    }
}

pub(crate) fn version(hello: &Hello) -> PeerVersion {
    PeerVersion {
        protocol: hello.protocol,
        release: hello.release.clone(),
    }
}

/// Images and messages of one release mean nothing to another.
pub(crate) fn same_version(
    peer: &str,
    ours: PeerVersion,
    theirs: PeerVersion,
) -> Result<(), ChannelError> {
    if ours == theirs {
        return Ok(());
    }
    Err(ChannelError::Version {
        peer: peer.to_owned(),
        ours,
        theirs,
    })
}

/// Time left; never zero, so that what is there already is still taken.
pub(crate) fn remaining(ends_at: Instant) -> Duration {
    ends_at
        .saturating_duration_since(Instant::now())
        .max(Duration::from_millis(1))
}
