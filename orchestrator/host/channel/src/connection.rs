//! A connection after TLS and before the first message of a migration.

use std::{
    fmt, io,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use migrate_core::wire::{Hello, ImagePiece, Message, PageRun};
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf, ReadHalf, WriteHalf, duplex, split},
    net::TcpStream,
    time::Instant,
};
use tokio_rustls::TlsStream;
use zeroize::Zeroizing;

use crate::{
    error::{ChannelError, PeerVersion, printable},
    frame::{Frame, FrameReader, FrameWriter},
    further::{Further, Lane, Registry, Token, tokens},
    lanes::{StreamOptions, StreamStats},
    ssh::SshSession,
};

/// A connection with TLS on it.
pub(crate) type Encrypted = TlsStream<TcpStream>;

/// What frames travel over.
pub(crate) enum Stream {
    /// To another host.
    Encrypted(Box<Encrypted>),
    /// Within this process, see [`Connection::pair`].
    Within(DuplexStream),
}

impl From<Encrypted> for Stream {
    fn from(encrypted: Encrypted) -> Self {
        Self::Encrypted(Box::new(encrypted))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Encrypted(stream) => Pin::new(stream).poll_read(context, buffer),
            Self::Within(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Encrypted(stream) => Pin::new(stream).poll_write(context, data),
            Self::Within(stream) => Pin::new(stream).poll_write(context, data),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Encrypted(stream) => Pin::new(stream).poll_flush(context),
            Self::Within(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Encrypted(stream) => Pin::new(stream).poll_shutdown(context),
            Self::Within(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }
}

/// What may be on its way within a process, in bytes: one batch of the page
/// stream, and the next.
const WITHIN_BYTES_MAX: usize = 512 << 10;

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
    /// The way to further connections, for pages.
    pub further: Further,
}

/// The sending half.
///
/// Every call fails with [`ChannelError::Deadline`] when the peer takes
/// nothing for the stall limit. A call that was cancelled or failed may leave
/// half a frame behind; every later call then fails with
/// [`ChannelError::HalfWritten`], and what is left is [`Sender::close`], which
/// tells the peer as much as a message would.
pub struct Sender(FrameWriter<WriteHalf<Stream>>);

impl Sender {
    /// Over a connection that has joined.
    pub(crate) fn over(
        write: WriteHalf<Stream>,
        read: ReadHalf<Stream>,
        peer: &str,
    ) -> (Self, Receiver) {
        (
            Self(FrameWriter::new(write, peer.to_owned())),
            Receiver(FrameReader::new(read, peer.to_owned())),
        )
    }

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

    /// From here on frames go over this connection and `further` in turn. The
    /// peer has to be told before, by a message.
    ///
    /// # Errors
    ///
    /// Stalled or disconnected.
    pub async fn stripe(
        &mut self,
        further: Vec<Lane>,
        options: StreamOptions,
    ) -> Result<(), ChannelError> {
        let further = further.into_iter().map(|lane| lane.write).collect();
        self.0.stripe(further, options).await
    }

    /// Ends the page stream: what follows comes over this connection alone.
    /// The last message said so.
    ///
    /// # Errors
    ///
    /// Stalled or disconnected.
    pub async fn unstripe(&mut self) -> Result<(), ChannelError> {
        self.0.unstripe().await
    }

    /// Holds the page stream to so many bytes a second, or no longer.
    pub fn set_limit(&mut self, bytes_per_s: Option<u64>) {
        self.0.set_limit(bytes_per_s);
    }

    /// What the page stream has done since it began.
    #[must_use]
    pub fn stream_stats(&self) -> StreamStats {
        self.0.stream_stats()
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
pub struct Receiver(FrameReader<ReadHalf<Stream>>);

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

    /// From here on frames come over this connection and `further` in turn.
    ///
    /// # Errors
    ///
    /// The peer has not waited for it.
    pub fn stripe(&mut self, further: Vec<Lane>) -> Result<(), ChannelError> {
        let further = further.into_iter().map(|lane| lane.read).collect();
        self.0.stripe(further)
    }

    /// The last message was that of the page stream; what follows comes over
    /// this connection alone.
    ///
    /// # Errors
    ///
    /// Anything but the end came, not within `deadline`, or disconnected.
    pub async fn unstripe(&mut self, deadline: Duration) -> Result<(), ChannelError> {
        self.0.unstripe(deadline).await
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

/// A peer that has passed TLS, by its first message.
pub(crate) enum Guest {
    /// A source.
    Source(Box<Connection>),
    /// One more connection of a migration; whoever waits for it has it.
    Lane,
}

type Reader = FrameReader<ReadHalf<Stream>>;
type Writer = FrameWriter<WriteHalf<Stream>>;

/// Both ends of a connection, and the peer's name for messages.
fn ends(
    stream: Encrypted,
) -> Result<(Reader, Writer, SocketAddr, SocketAddr, String), ChannelError> {
    let (tcp, _) = stream.get_ref();
    let addresses = tcp.local_addr().and_then(|l| Ok((l, tcp.peer_addr()?)));
    let (local_addr, peer_addr) = addresses.map_err(|source| ChannelError::Local {
        attempt: "read the addresses of a connection",
        source,
    })?;
    let name = peer_addr.to_string();
    let (read, write) = split(Stream::from(stream));
    Ok((
        FrameReader::new(read, name.clone()),
        FrameWriter::new(write, name.clone()),
        local_addr,
        peer_addr,
        name,
    ))
}

impl Connection {
    /// Introduces the source to the destination.
    pub(crate) async fn introduce(
        stream: Encrypted,
        hello: Hello,
        ends_at: Instant,
        further: impl FnOnce(String, SocketAddr) -> Further,
    ) -> Result<Self, ChannelError> {
        let (mut reader, mut writer, local_addr, peer_addr, name) = ends(stream)?;
        let theirs = introduce(&mut reader, &mut writer, &name, hello, ends_at).await?;
        let further = further(name, peer_addr);
        let halves = (Sender(writer), Receiver(reader));
        Ok(Self::new(halves, theirs, local_addr, peer_addr, further))
    }

    /// Receives a peer on the destination.
    pub(crate) async fn receive(
        stream: Encrypted,
        hello: Hello,
        ends_at: Instant,
        registry: &Arc<Registry>,
    ) -> Result<Guest, ChannelError> {
        let tokens = tokens(&stream)?;
        let (mut reader, mut writer, local_addr, peer_addr, name) = ends(stream)?;
        let theirs = match receive_first(&mut reader, &name, ends_at).await? {
            First::Hello(theirs) => theirs,
            First::Join(token) => {
                registry.admit(&token, reader, writer, &name).await?;
                return Ok(Guest::Lane);
            }
        };
        let theirs = answer(&mut writer, &name, hello, theirs).await?;
        let further = Further::wait(name, tokens, Arc::clone(registry));
        let halves = (Sender(writer), Receiver(reader));
        let source = Self::new(halves, theirs, local_addr, peer_addr, further);
        Ok(Guest::Source(Box::new(source)))
    }

    /// Both ends of a connection within this process, the source's first, for a
    /// peer that is no host but a directory. Nothing leaves the process, so
    /// nothing is encrypted; there are no addresses and no further connections.
    #[must_use]
    pub fn pair(source: Hello, destination: Hello) -> (Self, Self) {
        let nowhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let (ours, theirs) = duplex(WITHIN_BYTES_MAX);
        let end = |stream: DuplexStream, peer: Hello, further: Further| {
            let (read, write) = split(Stream::Within(stream));
            let name = peer.hostname.clone();
            let halves = (
                Sender(FrameWriter::new(write, name.clone())),
                Receiver(FrameReader::new(read, name)),
            );
            Self::new(halves, peer, nowhere, nowhere, further)
        };
        let waiting = Further::wait(
            source.hostname.clone(),
            Zeroizing::new(Vec::new()),
            Arc::new(Registry::default()),
        );
        let alone = Further::none(destination.hostname.clone());
        (end(ours, destination, alone), end(theirs, source, waiting))
    }

    /// A connection over which both have said hello.
    fn new(
        (sender, receiver): (Sender, Receiver),
        theirs: Hello,
        local_addr: SocketAddr,
        peer_addr: SocketAddr,
        further: Further,
    ) -> Self {
        Self {
            sender,
            receiver,
            peer: Peer {
                hostname: printable(&theirs.hostname, HOSTNAME_CHARS_MAX),
                address: peer_addr,
            },
            hello: theirs,
            local_addr,
            peer_addr,
            ssh: None,
            further,
        }
    }
}

/// The source speaks first.
pub(crate) async fn introduce<R, W>(
    reader: &mut FrameReader<R>,
    writer: &mut FrameWriter<W>,
    peer: &str,
    hello: Hello,
    ends_at: Instant,
) -> Result<Hello, ChannelError>
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin + Send + 'static,
{
    let ours = version(&hello);
    writer.control(&Message::Hello(hello)).await?;
    match receive_first(reader, peer, ends_at).await? {
        First::Hello(theirs) => {
            same_version(peer, ours, version(&theirs))?;
            Ok(theirs)
        }
        First::Join(_) => Err(not_introduced(peer)),
    }
}

/// The destination answers before it judges, so that both sides can name both
/// versions. A destination that has no migration of its own to name takes the
/// source's identifier.
pub(crate) async fn answer<W>(
    writer: &mut FrameWriter<W>,
    peer: &str,
    mut hello: Hello,
    theirs: Hello,
) -> Result<Hello, ChannelError>
where
    W: AsyncWrite + Unpin + Send + 'static,
{
    let ours = version(&hello);
    if hello.migration_id.is_empty() {
        hello.migration_id.clone_from(&theirs.migration_id);
    }
    writer.control(&Message::Hello(hello)).await?;
    same_version(peer, ours, version(&theirs))?;
    Ok(theirs)
}

/// A peer's first message.
#[derive(Debug)]
pub(crate) enum First {
    Hello(Hello),
    Join(Token),
}

pub(crate) async fn receive_first<R: AsyncRead + Unpin + Send + 'static>(
    reader: &mut FrameReader<R>,
    peer: &str,
    ends_at: Instant,
) -> Result<First, ChannelError> {
    match reader.control(remaining(ends_at)).await {
        Ok(Message::Hello(theirs)) => Ok(First::Hello(theirs)),
        Ok(Message::Join { token }) => Ok(First::Join(token)),
        Ok(_) => Err(not_introduced(peer)),
        Err(ChannelError::Deadline { waited, .. }) => Err(ChannelError::Deadline {
            awaited: format!("{peer} to introduce itself"),
            waited,
        }),
        Err(error) => Err(error),
    }
}

fn not_introduced(peer: &str) -> ChannelError {
    ChannelError::Unexpected {
        peer: peer.to_owned(),
        got: "another message",
        wanted: "its introduction",
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
