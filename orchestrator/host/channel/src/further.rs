//! Further connections of a migration, for its pages.
//!
//! They go where the first one went, under the same certificates. What proves
//! that they belong to it is a token that both sides derive from the keys of
//! the first connection's TLS (RFC 8446, 7.5), so nobody else has it, and
//! another migration has others. Each token opens one connection, once.

use std::{
    collections::HashMap,
    fmt,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use migrate_core::{
    stream::STREAMS_MAX,
    wire::{Hello, Message},
};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{
    io::{ReadHalf, WriteHalf, split},
    net::TcpStream,
    sync::mpsc,
    task::{JoinHandle, JoinSet},
    time::{Instant, timeout},
};
use zeroize::Zeroizing;

use crate::{
    agent::Door,
    connect::encrypt,
    connection::{Encrypted, Receiver, Sender, Stream, remaining},
    error::ChannelError,
    frame::{FrameReader, FrameWriter},
};

/// What both sides know of a further connection before it exists.
pub(crate) type Token = [u8; 32];

/// Names the purpose of what is derived from a connection's keys.
const LABEL: &[u8] = b"EXPORTER-migrate-page-stream";

/// One more connection, which has joined.
pub struct Lane {
    pub(crate) read: ReadHalf<Stream>,
    pub(crate) write: WriteHalf<Stream>,
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lane")
    }
}

impl Lane {
    /// Both halves of the connection, for frames of its own in place of its part
    /// of the page stream. `peer` is for messages.
    #[must_use]
    pub fn into_ends(self, peer: &str) -> (Sender, Receiver) {
        Sender::over(self.write, self.read, peer)
    }
}

/// The way to further connections of a migration.
pub struct Further {
    peer: String,
    tokens: Zeroizing<Vec<Token>>,
    way: Way,
}

enum Way {
    /// Of the source: there again.
    Dial {
        address: SocketAddr,
        name: ServerName<'static>,
        config: Arc<ClientConfig>,
    },
    /// Of the destination: through the door where the first one came in.
    Await {
        registry: Arc<Registry>,
        /// Behind SSH the door is this migration's alone.
        door: Option<(Box<Door>, Hello)>,
    },
    /// Within one process there is none.
    None,
}

impl fmt::Debug for Further {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Further")
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

/// A token for each connection that there may be, from the keys of the first.
pub(crate) fn tokens(stream: &Encrypted) -> Result<Zeroizing<Vec<Token>>, ChannelError> {
    let mut tokens = Zeroizing::new(Vec::with_capacity(STREAMS_MAX as usize));
    for index in 0..STREAMS_MAX {
        let context = index.to_be_bytes();
        let token = match stream {
            Encrypted::Client(tls) => {
                let keys = tls.get_ref().1;
                keys.export_keying_material(Token::default(), LABEL, Some(&context))
            }
            Encrypted::Server(tls) => {
                let keys = tls.get_ref().1;
                keys.export_keying_material(Token::default(), LABEL, Some(&context))
            }
        };
        tokens.push(token.map_err(|error| ChannelError::TlsSetup {
            source: Box::new(error),
        })?);
    }
    Ok(tokens)
}

impl Further {
    pub(crate) fn dial(
        peer: String,
        tokens: Zeroizing<Vec<Token>>,
        address: SocketAddr,
        name: ServerName<'static>,
        config: Arc<ClientConfig>,
    ) -> Self {
        let way = Way::Dial {
            address,
            name,
            config,
        };
        Self { peer, tokens, way }
    }

    pub(crate) fn wait(
        peer: String,
        tokens: Zeroizing<Vec<Token>>,
        registry: Arc<Registry>,
    ) -> Self {
        let way = Way::Await {
            registry,
            door: None,
        };
        Self { peer, tokens, way }
    }

    /// On a connection that stays alone.
    pub(crate) fn none(peer: String) -> Self {
        Self {
            peer,
            tokens: Zeroizing::new(Vec::new()),
            way: Way::None,
        }
    }

    /// The door is this migration's alone and goes with it.
    pub(crate) fn keep(&mut self, opened: Door, hello: Hello) {
        if let Way::Await { door, .. } = &mut self.way {
            *door = Some((Box::new(opened), hello));
        }
    }

    /// On the source: opens so many further connections, once the destination
    /// expects them.
    ///
    /// # Errors
    ///
    /// One of them could not be opened within `deadline`, or did not join.
    pub async fn open(self, count: u32, deadline: Duration) -> Result<Vec<Lane>, ChannelError> {
        let ends_at = Instant::now() + deadline;
        if count == 0 && matches!(self.way, Way::None) {
            return Ok(Vec::new());
        }
        let Way::Dial {
            address,
            name,
            config,
        } = self.way
        else {
            return Err(self.wrong_side());
        };
        let mut joining = JoinSet::new();
        for (index, token) in self.tokens.iter().copied().enumerate().take(count as usize) {
            let (name, config) = (name.clone(), Arc::clone(&config));
            joining.spawn(async move {
                let tcp = timeout(remaining(ends_at), TcpStream::connect(address)).await;
                let tcp = tcp.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
                let tcp = tcp.map_err(|source| ChannelError::DirectUnreachable {
                    address: address.to_string(),
                    beside_ssh: false,
                    source,
                })?;
                let stream = encrypt(tcp, name, config, ends_at).await?;
                let lane = join(stream, token, address, ends_at).await?;
                Ok::<_, ChannelError>((index, lane))
            });
        }
        let mut lanes = Vec::new();
        while let Some(joined) = joining.join_next().await {
            lanes.push(joined.unwrap_or_else(|_| {
                Err(ChannelError::Closed {
                    peer: self.peer.clone(),
                })
            })?);
        }
        lanes.sort_by_key(|(index, _)| *index);
        Ok(lanes.into_iter().map(|(_, lane)| lane).collect())
    }

    /// On the destination: from now on so many further connections may join.
    ///
    /// # Errors
    ///
    /// More than there can be.
    pub fn expect(self, count: u32) -> Result<Expected, ChannelError> {
        let Way::Await { registry, door } = self.way else {
            return Err(self.wrong_side());
        };
        let Some(tokens) = self.tokens.get(..count as usize) else {
            return Err(ChannelError::Unexpected {
                peer: self.peer,
                got: "too many connections",
                wanted: "a few",
            });
        };
        let tokens = Zeroizing::new(tokens.to_vec());
        let (sender, joined) = mpsc::channel(tokens.len().max(1));
        registry.add(&tokens, &sender);
        let door = door
            .filter(|_| count > 0)
            .map(|(mut door, hello)| tokio::spawn(async move { door.admit(&hello).await }));
        Ok(Expected {
            peer: self.peer,
            tokens,
            registry,
            joined,
            door,
        })
    }

    #[cfg(test)]
    pub(crate) fn all_tokens(&self) -> &[Token] {
        &self.tokens
    }

    /// The same way again, as an attacker would try it.
    #[cfg(test)]
    pub(crate) fn clone(&self) -> Self {
        let Way::Dial {
            address,
            name,
            config,
        } = &self.way
        else {
            panic!("no source");
        };
        Self {
            peer: self.peer.clone(),
            tokens: self.tokens.clone(),
            way: Way::Dial {
                address: *address,
                name: name.clone(),
                config: Arc::clone(config),
            },
        }
    }

    fn wrong_side(&self) -> ChannelError {
        ChannelError::Unexpected {
            peer: self.peer.clone(),
            got: "the wrong side",
            wanted: "the other",
        }
    }
}

/// Proves on a new connection which migration it belongs to.
async fn join(
    stream: Encrypted,
    token: Token,
    address: SocketAddr,
    ends_at: Instant,
) -> Result<Lane, ChannelError> {
    let peer = address.to_string();
    let (read, write) = split(Stream::from(stream));
    let mut reader = FrameReader::new(read, peer.clone());
    let mut writer = FrameWriter::new(write, peer.clone());
    writer.control(&Message::Join { token }).await?;
    match reader.control(remaining(ends_at)).await? {
        Message::Joined => lane(reader, writer, peer),
        _ => Err(ChannelError::Unexpected {
            peer,
            got: "another message",
            wanted: "its word that the connection belongs to the migration",
        }),
    }
}

fn lane(
    reader: FrameReader<ReadHalf<Stream>>,
    writer: FrameWriter<WriteHalf<Stream>>,
    peer: String,
) -> Result<Lane, ChannelError> {
    match (reader.into_stream(), writer.into_stream()) {
        (Some(read), Some(write)) => Ok(Lane { read, write }),
        _ => Err(ChannelError::Unexpected {
            peer,
            got: "more than that",
            wanted: "nothing",
        }),
    }
}

/// Further connections that the destination waits for.
pub struct Expected {
    peer: String,
    tokens: Zeroizing<Vec<Token>>,
    registry: Arc<Registry>,
    joined: mpsc::Receiver<(usize, Lane)>,
    door: Option<JoinHandle<()>>,
}

impl fmt::Debug for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Expected")
            .field("count", &self.tokens.len())
            .finish_non_exhaustive()
    }
}

impl Expected {
    /// Waits until all have joined.
    ///
    /// # Errors
    ///
    /// Not all have within `deadline`.
    pub async fn all(mut self, deadline: Duration) -> Result<Vec<Lane>, ChannelError> {
        self.joined(deadline).await
    }

    /// As [`Self::all`], and the door stays open.
    #[cfg(test)]
    pub(crate) async fn all_and_keep(
        mut self,
        deadline: Duration,
    ) -> Result<(Vec<Lane>, Self), ChannelError> {
        Ok((self.joined(deadline).await?, self))
    }

    async fn joined(&mut self, deadline: Duration) -> Result<Vec<Lane>, ChannelError> {
        let count = self.tokens.len();
        let mut lanes = Vec::with_capacity(count);
        let waiting = async {
            while lanes.len() < count
                && let Some(lane) = self.joined.recv().await
            {
                lanes.push(lane);
            }
        };
        // All that have come by then are there; the others are missed below.
        let _ = timeout(deadline, waiting).await;
        if lanes.len() < count {
            return Err(ChannelError::Deadline {
                awaited: format!("{} to open its further connections", self.peer),
                waited: deadline,
            });
        }
        lanes.sort_by_key(|(index, _)| *index);
        Ok(lanes.into_iter().map(|(_, lane)| lane).collect())
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.registry.forget(&self.tokens);
        if let Some(door) = &self.door {
            door.abort();
        }
    }
}

/// Tokens that open a connection now, and who waits for it.
#[derive(Default)]
pub(crate) struct Registry(Mutex<HashMap<Token, Place>>);

/// Which of a migration's connections a token opens.
struct Place {
    index: usize,
    wanted: mpsc::Sender<(usize, Lane)>,
}

impl Registry {
    fn add(&self, tokens: &[Token], wanted: &mpsc::Sender<(usize, Lane)>) {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, token) in tokens.iter().enumerate() {
            let wanted = wanted.clone();
            places.insert(*token, Place { index, wanted });
        }
    }

    fn forget(&self, tokens: &[Token]) {
        let mut places = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for token in tokens {
            places.remove(token);
        }
    }

    /// Lets a connection in whose first message was this token.
    pub(crate) async fn admit(
        &self,
        token: &Token,
        reader: FrameReader<ReadHalf<Stream>>,
        mut writer: FrameWriter<WriteHalf<Stream>>,
        peer: &str,
    ) -> Result<(), ChannelError> {
        // Used up, whatever becomes of the connection.
        let place = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(token);
        let Some(Place { index, wanted }) = place else {
            return Err(ChannelError::Unexpected {
                peer: peer.to_owned(),
                got: "a token that is not valid",
                wanted: "a connection of a migration under way",
            });
        };
        writer.control(&Message::Joined).await?;
        let lane = lane(reader, writer, peer.to_owned())?;
        // Nobody may be waiting any longer; then the connection ends here.
        let _ = wanted.try_send((index, lane));
        Ok(())
    }
}
