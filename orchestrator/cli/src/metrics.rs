//! Where an agent's figures are served: to this host alone, for they tell who moves
//! where and nobody is asked who he is.

use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
use migrate_session::figures;

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
    let builder = match place {
        Place::Loopback(address) => builder.with_http_listener(*address),
        Place::Socket(path) => {
            clear(path);
            builder.with_http_uds_listener(path)
        }
    };
    builder.install().map_err(|error| wrong(&error))?;
    figures::begin();
    Ok(())
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
    use super::*;

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
