//! Where an agent's figures are served: to this host alone, for they tell who moves
//! where and nobody is asked who he is.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use migrate_session::figures;
use nix::sys::stat::{Mode, fchmod};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixSocket};
use tokio::sync::Semaphore;

/// Connections at a time, of which a scraper needs one. Any user of the host may open
/// them, and each takes a descriptor of the agent; what comes beyond waits outside.
const CONNECTIONS_MAX: usize = 8;

/// How long one may last, for a question of one line and an answer of some KiB.
const CONNECTION_MAX: Duration = Duration::from_secs(10);

/// The longest head of a question, in bytes: the least that hyper takes.
const HEAD_BYTES_MAX: usize = 8192;

/// Until the next try where a connection could not be accepted, for want of
/// descriptors, say.
const PAUSE: Duration = Duration::from_secs(1);

/// Between two clearings of what histograms have gathered; the exporter's own default.
const UPKEEP: Duration = Duration::from_secs(5);

/// Connections to a socket that wait to be accepted.
const BACKLOG: u32 = 16;

/// A place that only this host reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A loopback address.
    Loopback(SocketAddr),
    /// A socket in the file system.
    Socket(PathBuf),
}

/// Reads `--metrics`.
pub fn place(text: &str) -> Result<Place, String> {
    if let Some(path) = text.strip_prefix("unix:") {
        if !path.starts_with('/') {
            return Err(format!("`{path}` is no absolute path of a socket"));
        }
        return Ok(Place::Socket(path.into()));
    }
    let address: SocketAddr = text
        .parse()
        .map_err(|_| format!("`{text}` is neither 127.0.0.1:PORT, [::1]:PORT nor unix:PATH"))?;
    if !address.ip().to_canonical().is_loopback() {
        return Err(format!(
            "{} is reached from other hosts, and nobody is asked who he is: take 127.0.0.1:{} and \
             put a proxy in front that asks",
            address.ip(),
            address.port()
        ));
    }
    Ok(Place::Loopback(address))
}

/// Begins to collect and to serve.
///
/// # Errors
///
/// A text for the user.
pub fn serve(place: &Place) -> Result<(), String> {
    let wrong = |error: &dyn std::fmt::Display| {
        let place = match place {
            Place::Loopback(address) => address.to_string(),
            Place::Socket(path) => path.display().to_string(),
        };
        format!(
            "could not serve metrics at {place}: {error}\nhelp: name another place with --metrics"
        )
    };
    let seconds = Matcher::Suffix("_seconds".to_owned());
    let builder = PrometheusBuilder::new()
        .set_buckets_for_metric(seconds, &figures::BUCKETS_S)
        .map_err(|error| wrong(&error))?;
    // Nothing is collected where nobody can ask.
    let listener = Listener::bind(place).map_err(|error| wrong(&error))?;
    let handle = builder.install_recorder().map_err(|error| wrong(&error))?;
    let upkeep = handle.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(UPKEEP).await;
            upkeep.run_upkeep();
        }
    });
    tokio::spawn(answer_all(listener, handle, CONNECTION_MAX));
    figures::begin();
    Ok(())
}

/// Where questions come from.
#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A connection of either kind.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Listener {
    fn bind(place: &Place) -> io::Result<Self> {
        match place {
            Place::Loopback(address) => {
                let listener = std::net::TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                TcpListener::from_std(listener).map(Self::Tcp)
            }
            Place::Socket(path) => {
                clear(path);
                let socket = UnixSocket::new_stream()?;
                // Linux gives the file the mode of the socket that is bound to it, so
                // that nobody else can be faster than a change of mode.
                fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
                socket.bind(path)?;
                socket.listen(BACKLOG).map(Self::Unix)
            }
        }
    }

    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Tcp(listener) => Box::new(listener.accept().await?.0),
            Self::Unix(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

/// Answers for as long as the agent runs, each connection once and within `limit`.
async fn answer_all(listener: Listener, handle: PrometheusHandle, limit: Duration) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // The semaphore is never closed.
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection for metrics was not accepted");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let handle = handle.clone();
        tokio::spawn(async move {
            let answer = service_fn(|_: Request<hyper::body::Incoming>| {
                let mut answer = Response::new(handle.render());
                let text = HeaderValue::from_static("text/plain; version=0.0.4");
                answer.headers_mut().insert(CONTENT_TYPE, text);
                std::future::ready(Ok::<_, Infallible>(answer))
            });
            let served = http1::Builder::new()
                .keep_alive(false)
                .max_buf_size(HEAD_BYTES_MAX)
                .serve_connection(TokioIo::new(stream), answer);
            if let Ok(Err(error)) = tokio::time::timeout(limit, served).await {
                tracing::debug!(%error, "a question for metrics was not answered");
            }
            drop(place);
        });
    }
}

/// Removes the socket of an agent that has ended without doing so.
fn clear(path: &Path) {
    let is_socket = path
        .symlink_metadata()
        .is_ok_and(|file| file.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err() {
        let _ = std::fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn who_says_nothing_is_sent_away_and_the_next_one_is_answered() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.sock");
        let listener = Listener::bind(&Place::Socket(path.clone())).unwrap();
        let mode = path.metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let handle = PrometheusBuilder::new().build_recorder().handle();
        tokio::spawn(answer_all(listener, handle, Duration::from_millis(200)));
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            silent.push(tokio::net::UnixStream::connect(&path).await.unwrap());
        }
        let mut asking = tokio::net::UnixStream::connect(&path).await.unwrap();
        let question = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
        asking.write_all(question).await.unwrap();
        let mut said = String::new();
        asking.read_to_string(&mut said).await.unwrap();
        assert!(said.starts_with("HTTP/1.1 200"), "{said}");
        // Only then there was a place for the one that asked.
        let ended = |stream: &tokio::net::UnixStream| matches!(stream.try_read(&mut [0]), Ok(0));
        assert!(silent.iter().any(ended));
        // A socket that somebody serves is not taken away.
        assert!(Listener::bind(&Place::Socket(path)).is_err());
    }

    #[test]
    fn metrics_stay_on_this_host() {
        for text in ["127.0.0.1:9464", "[::1]:9464", "[::ffff:127.0.0.1]:9464"] {
            assert_eq!(place(text), Ok(Place::Loopback(text.parse().unwrap())));
        }
        assert_eq!(
            place("unix:/run/m.sock"),
            Ok(Place::Socket("/run/m.sock".into()))
        );
        for text in ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "unix:m", "9464", ""] {
            assert!(place(text).is_err(), "{text}");
        }
    }
}
