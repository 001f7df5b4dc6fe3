//! The destination's end: the agent behind SSH, and the standing one.

use std::{
    env, fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    os::{fd::AsFd as _, unix::process::parent_id},
    sync::Arc,
    thread,
    time::Duration,
};

use migrate_core::chain;
use migrate_core::wire::Hello;
use nix::unistd::{dup2_stdin, dup2_stdout};
use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream, lookup_host},
    signal::unix::{SignalKind, signal},
    sync::{Mutex, oneshot},
    task::JoinSet,
    time::{Instant, timeout},
};
use tokio_rustls::TlsAcceptor;

use crate::{
    bootstrap::{self, Answer, LINE_BYTES_MAX, Offer},
    connect::TlsFiles,
    connection::{Connection, Guest, same_version, version},
    error::ChannelError,
    further::Registry,
    tls::{self, OneTimeIdentity},
};

/// How long a source that has let go of SSH may take to finish its handshake.
const HANDSHAKE_GRACE: Duration = Duration::from_secs(3);

/// How long the agent waits for the source's line, and then for its connection.
const SOURCE_LIMIT: Duration = Duration::from_secs(30);

/// How long a stranger may take from TCP to the end of its introduction.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// Handshakes under way at one time; more wait in the kernel's backlog.
pub(crate) const HANDSHAKES_MAX: usize = 16;

/// How far up the process tree the variables of the SSH session are looked
/// for: `sudo` and a shell or two may stand in between.
const ANCESTORS_MAX: usize = 8;

/// Serves one source, as `migrate agent --stdio` behind SSH.
///
/// When it returns a connection, standard input and output lead to
/// `/dev/null`, SIGHUP has no effect, and SSH is not needed any longer. An
/// empty `migration_id` in `hello` becomes the source's.
///
/// # Errors
///
/// The source is of another version, went away or did not come in time, or
/// this is no SSH session. Where it can, the source has been told.
pub async fn serve_stdio(hello: Hello) -> Result<Connection, ChannelError> {
    let (line, gone) = watch_stdin()?;
    let line = match timeout(SOURCE_LIMIT, line).await {
        Ok(Ok(line)) => line?,
        Ok(Err(_)) => {
            return Err(ChannelError::SourceGone {
                awaited: "the source's offer",
            });
        }
        Err(_) => {
            return Err(ChannelError::Deadline {
                awaited: "the source's offer on standard input".into(),
                waited: SOURCE_LIMIT,
            });
        }
    };
    let mut answer = Answer::new(&hello);
    let mut door = match prepare(&line, &hello, &mut answer).await {
        Ok(door) => door,
        Err(error) => {
            answer.error = Some(chain(&error));
            answer.help = error.help();
            if let Err(error) = say(&answer) {
                tracing::warn!(%error, "the source could not be told");
            }
            return Err(error);
        }
    };
    say(&answer)?;
    let name = door.name();
    let mut connection = {
        let next = timeout(SOURCE_LIMIT, door.next(&hello));
        tokio::pin!(next);
        let came = tokio::select! {
            biased;
            came = &mut next => came,
            // The source lets go of SSH as soon as its side of the handshake
            // is done; this side may have a step to go.
            _ = gone => timeout(HANDSHAKE_GRACE, next).await.map_err(|_| ChannelError::SourceGone {
                awaited: "the source had connected",
            })?,
        };
        came.unwrap_or_else(|_| {
            Err(ChannelError::Deadline {
                awaited: format!("the source to connect to {name}"),
                waited: SOURCE_LIMIT,
            })
        })?
    };
    let_go_of_ssh()?;
    connection.further.keep(door, hello);
    Ok(connection)
}

/// Everything that has to be right before the source is told to come.
async fn prepare(line: &[u8], hello: &Hello, answer: &mut Answer) -> Result<Door, ChannelError> {
    const OFFER: &str = "offer of the source";
    let theirs = bootstrap::version(line, OFFER)?;
    same_version("the source", version(hello), theirs)?;
    let offer: Offer = bootstrap::parse(line, OFFER)?;
    let source = bootstrap::decode_certificate(&offer.certificate)?;
    let connection = ssh_connection().ok_or(ChannelError::NotUnderSsh)?;
    let address = server_address(&connection).ok_or(ChannelError::NotUnderSsh)?;
    let listener = listen_beside_ssh(address).await?;
    let identity = OneTimeIdentity::generate()?;
    answer.certificate = bootstrap::encode_certificate(&identity.certificate);
    let door = Door::new(listener, identity.server(source)?)?;
    let mut listens_at = door.local_addr;
    if let SocketAddr::V6(v6) = &mut listens_at {
        // The zone means nothing on another host.
        v6.set_scope_id(0);
    }
    answer.addresses = vec![listens_at];
    // The source's certificate is known: whoever passes TLS is the source, and
    // a failure after that is final.
    Ok(Door {
        strangers_expected: false,
        ..door
    })
}

/// Listens on a port of its own on `address`, which may have a zone (`fe80::1%eth0`).
async fn listen_beside_ssh(address: &str) -> Result<TcpListener, ChannelError> {
    let failed = |source| ChannelError::Listen {
        address: address.to_owned(),
        source,
    };
    let found = lookup_host((address, 0)).await.map_err(failed)?;
    let found: Vec<SocketAddr> = found
        .map(|a| match a.ip().to_canonical() {
            ip @ IpAddr::V4(_) => SocketAddr::new(ip, 0),
            IpAddr::V6(_) => a,
        })
        .collect();
    TcpListener::bind(found.as_slice()).await.map_err(failed)
}

/// `CLIENT CLIENT-PORT SERVER SERVER-PORT`, as sshd sets it.
fn server_address(connection: &str) -> Option<&str> {
    let mut words = connection.split_ascii_whitespace();
    let server = words.nth(2)?;
    words.next()?.parse::<u16>().ok()?;
    Some(server)
}

/// `SSH_CONNECTION` of this process, or of the nearest ancestor that has it:
/// `sudo` removes it from what it starts.
fn ssh_connection() -> Option<String> {
    const NAME: &str = "SSH_CONNECTION";
    if let Ok(value) = env::var(NAME) {
        return Some(value);
    }
    let mut pid = parent_id();
    for _ in 0..ANCESTORS_MAX {
        if pid <= 1 {
            return None;
        }
        let environ = fs::read(format!("/proc/{pid}/environ")).ok()?;
        let value = environ
            .split(|b| *b == 0)
            .filter_map(|entry| std::str::from_utf8(entry).ok())
            .find_map(|entry| entry.strip_prefix(NAME)?.strip_prefix('='));
        if let Some(value) = value {
            return Some(value.to_owned());
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        pid = status
            .lines()
            .find_map(|line| line.strip_prefix("PPid:"))?
            .trim()
            .parse()
            .ok()?;
    }
    None
}

type Line = oneshot::Receiver<Result<Vec<u8>, ChannelError>>;

/// Reads the source's line and then waits for the end of standard input.
///
/// On a thread of its own: one of the runtime's would keep the process from
/// ending for as long as the read takes. And on a descriptor of its own: the
/// thread stays behind when standard input is let go of, and must not hold
/// the lock of the one that the rest of the process sees.
fn watch_stdin() -> Result<(Line, oneshot::Receiver<()>), ChannelError> {
    let (line_tx, line_rx) = oneshot::channel();
    let (gone_tx, gone_rx) = oneshot::channel();
    let stdin = io::stdin().as_fd().try_clone_to_owned();
    let stdin = stdin.map_err(|source| ChannelError::Local {
        attempt: "duplicate standard input",
        source,
    })?;
    thread::Builder::new()
        .name("stdin".into())
        .spawn(move || {
            let mut stdin = BufReader::new(fs::File::from(stdin));
            // Nobody may be waiting any longer; then it does not matter.
            let _ = line_tx.send(read_line(&mut stdin));
            let _ = io::copy(&mut stdin, &mut io::sink());
            let _ = gone_tx.send(());
        })
        .map_err(|source| ChannelError::Local {
            attempt: "start a thread for standard input",
            source,
        })?;
    Ok((line_rx, gone_rx))
}

fn read_line(from: &mut impl io::BufRead) -> Result<Vec<u8>, ChannelError> {
    let mut line = Vec::new();
    let mut bounded = from.take(LINE_BYTES_MAX as u64);
    bounded
        .read_until(b'\n', &mut line)
        .map_err(|source| ChannelError::Local {
            attempt: "read standard input",
            source,
        })?;
    if line.last() == Some(&b'\n') {
        line.pop();
        return Ok(line);
    }
    if line.len() >= LINE_BYTES_MAX {
        return Err(ChannelError::Bootstrap {
            what: "offer of the source: it is too long",
            source: None,
        });
    }
    Err(ChannelError::SourceGone {
        awaited: "the source's offer",
    })
}

fn say(answer: &Answer) -> Result<(), ChannelError> {
    let line = bootstrap::line(answer, "answer to the source")?;
    let mut stdout = io::stdout().lock();
    stdout
        .write_all(&line)
        .and_then(|()| stdout.flush())
        .map_err(|source| ChannelError::Local {
            attempt: "write to standard output",
            source,
        })
}

/// From here on the session may end without any effect on this process. Rust
/// programs ignore SIGPIPE already.
fn let_go_of_ssh() -> Result<(), ChannelError> {
    let failed = |source| ChannelError::Local {
        attempt: "let go of the SSH session",
        source,
    };
    // The handler stays when its receiver is dropped, and unlike an ignored
    // signal it is not inherited by the programs started from here.
    drop(signal(SignalKind::hangup()).map_err(failed)?);
    let null = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map_err(failed)?;
    dup2_stdin(&null)
        .and_then(|()| dup2_stdout(&null))
        .map_err(|errno| failed(errno.into()))
}

/// An agent that waits for sources with a certificate of its authority.
pub struct StandingAgent {
    door: Mutex<Door>,
    local_addr: SocketAddr,
}

impl StandingAgent {
    /// Starts to listen. Where `peers` are given, a source has to have one of
    /// these names in its certificate.
    ///
    /// # Errors
    ///
    /// Unusable certificates or names, or the address cannot be had.
    pub async fn bind(
        listen: SocketAddr,
        files: &TlsFiles,
        peers: Option<&[String]>,
    ) -> Result<Self, ChannelError> {
        let config = tls::server_from_files(files, peers)?;
        let listener = TcpListener::bind(listen)
            .await
            .map_err(|source| ChannelError::Listen {
                address: listen.to_string(),
                source,
            })?;
        let door = Door::new(listener, config)?;
        Ok(Self {
            local_addr: door.local_addr,
            door: Mutex::new(door),
        })
    }

    /// Waits for the next source, without a deadline. May be cancelled.
    ///
    /// Peers that fail the handshake or are of another version are logged and
    /// passed over: they must not end an agent that serves others.
    ///
    /// # Errors
    ///
    /// The listening socket failed.
    pub async fn accept(&self, hello: Hello) -> Result<Connection, ChannelError> {
        self.door.lock().await.next(&hello).await
    }

    /// Where it listens; the port is the real one also after binding to port 0.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }
}

impl std::fmt::Debug for StandingAgent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StandingAgent")
            .field("local_addr", &self.local_addr)
            .finish_non_exhaustive()
    }
}

/// A listening socket and the handshakes that came through it. A stranger that
/// connects and says nothing holds up nobody else.
pub(crate) struct Door {
    listener: TcpListener,
    config: Arc<ServerConfig>,
    handshakes: JoinSet<Result<Guest, Refused>>,
    /// Further connections that migrations wait for.
    registry: Arc<Registry>,
    pub(crate) local_addr: SocketAddr,
    pub(crate) strangers_expected: bool,
}

/// A peer that did not become a connection.
struct Refused {
    address: SocketAddr,
    /// It had shown a certificate that counts.
    known: bool,
    error: ChannelError,
}

impl Door {
    pub(crate) fn new(
        listener: TcpListener,
        config: Arc<ServerConfig>,
    ) -> Result<Self, ChannelError> {
        let local_addr = listener
            .local_addr()
            .map_err(|source| ChannelError::Local {
                attempt: "read the address of the listening socket",
                source,
            })?;
        Ok(Self {
            listener,
            config,
            handshakes: JoinSet::new(),
            registry: Arc::default(),
            local_addr,
            strangers_expected: true,
        })
    }

    fn name(&self) -> SocketAddr {
        self.local_addr
    }

    /// Lets further connections in until the door is closed; nobody else is
    /// waited for any longer.
    pub(crate) async fn admit(&mut self, hello: &Hello) {
        loop {
            match self.next(hello).await {
                Ok(source) => tracing::warn!(peer = %source.peer, "a second source, not wanted"),
                Err(error @ ChannelError::Accept { .. }) => {
                    tracing::error!(error = chain(&error), "no further connections");
                    return;
                }
                Err(error) => tracing::warn!(error = chain(&error), "refused a connection"),
            }
        }
    }

    /// The next peer that proves who it is and speaks this version.
    pub(crate) async fn next(&mut self, hello: &Hello) -> Result<Connection, ChannelError> {
        loop {
            tokio::select! {
                Some(finished) = self.handshakes.join_next() => match finished {
                    Ok(Ok(Guest::Source(connection))) => return Ok(*connection),
                    Ok(Ok(Guest::Lane)) => {}
                    Ok(Err(refused)) => {
                        if refused.known && !self.strangers_expected {
                            return Err(refused.error);
                        }
                        tracing::warn!(
                            peer = %refused.address,
                            error = chain(&refused.error),
                            "refused a connection"
                        );
                    }
                    Err(error) => tracing::error!(%error, "a handshake was lost"),
                },
                accepted = self.listener.accept(), if self.handshakes.len() < HANDSHAKES_MAX => {
                    match accepted {
                        Ok((tcp, address)) => {
                            let config = Arc::clone(&self.config);
                            let hello = hello.clone();
                            let registry = Arc::clone(&self.registry);
                            self.handshakes.spawn(greet(tcp, address, config, hello, registry));
                        }
                        // The peer was gone before it was accepted.
                        Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                        Err(source) => return Err(ChannelError::Accept {
                            address: self.local_addr.to_string(),
                            source,
                        }),
                    }
                }
            }
        }
    }
}

async fn greet(
    tcp: TcpStream,
    address: SocketAddr,
    config: Arc<ServerConfig>,
    hello: Hello,
    registry: Arc<Registry>,
) -> Result<Guest, Refused> {
    let ends_at = Instant::now() + HANDSHAKE_LIMIT;
    let peer = address.to_string();
    let stranger = |error| Refused {
        address,
        known: false,
        error,
    };
    tcp.set_nodelay(true)
        .map_err(|source| stranger(ChannelError::from_stream(&peer, source)))?;
    let stream = match timeout(HANDSHAKE_LIMIT, TlsAcceptor::from(config).accept(tcp)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(source)) => return Err(stranger(ChannelError::Handshake { peer, source })),
        Err(_) => {
            return Err(stranger(ChannelError::Deadline {
                awaited: format!("the TLS handshake with {peer}"),
                waited: HANDSHAKE_LIMIT,
            }));
        }
    };
    Connection::receive(stream.into(), hello, ends_at, &registry)
        .await
        .map_err(|error| Refused {
            address,
            known: true,
            error,
        })
}
