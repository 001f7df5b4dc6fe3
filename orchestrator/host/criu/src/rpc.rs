//! CRIU's RPC messages, and the socket that carries them.
//!
//! `criu swrk FD` speaks bare protobuf messages over a `SOCK_SEQPACKET` socket:
//! one message is one packet, without further framing. Only the fields that are
//! used here are declared; protobuf skips the others. Numbers are those of
//! CRIU's `images/rpc.proto`.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket::{MsgFlags, recv, send};
use prost::Message;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `criu_req_type` values.
pub(crate) mod kind {
    pub(crate) const DUMP: i32 = 1;
    pub(crate) const RESTORE: i32 = 2;
    pub(crate) const NOTIFY: i32 = 6;
    pub(crate) const FEATURE_CHECK: i32 = 9;
    pub(crate) const VERSION: i32 = 10;
    pub(crate) const SINGLE_PRE_DUMP: i32 = 13;
}

/// `criu_network_lock_method.IPTABLES`: two rules a connection.
pub(crate) const NETWORK_LOCK_IPTABLES: i32 = 1;
/// `criu_network_lock_method.NFTABLES`: a table with a set of connections.
pub(crate) const NETWORK_LOCK_NFTABLES: i32 = 2;
/// `criu_network_lock_method.SKIP`: the caller keeps the network quiet.
pub(crate) const NETWORK_LOCK_SKIP: i32 = 3;
/// `criu_cg_mode.IGNORE`: cgroups are neither dumped nor restored.
pub(crate) const CGROUPS_IGNORE: i32 = 0;

/// Largest answer that is accepted, in bytes. CRIU's own are a few hundred;
/// the longest part is its first error message, at most one log line.
const RESPONSE_BYTES_MAX: usize = 64 << 10;

#[derive(Clone, PartialEq, Message)]
pub(crate) struct PageServerInfo {
    #[prost(int32, optional, tag = "4")]
    pub fd: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct InheritFd {
    #[prost(string, required, tag = "1")]
    pub key: String,
    #[prost(int32, required, tag = "2")]
    pub fd: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Options {
    /// Required by the protocol; -1 stands for "see `images_dir`".
    #[prost(int32, required, tag = "1")]
    pub images_dir_fd: i32,
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
    #[prost(bool, optional, tag = "4")]
    pub ext_unix_sk: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    pub tcp_established: Option<bool>,
    #[prost(bool, optional, tag = "7")]
    pub shell_job: Option<bool>,
    #[prost(bool, optional, tag = "8")]
    pub file_locks: Option<bool>,
    #[prost(int32, optional, tag = "9")]
    pub log_level: Option<i32>,
    #[prost(string, optional, tag = "10")]
    pub log_file: Option<String>,
    #[prost(message, optional, tag = "11")]
    pub ps: Option<PageServerInfo>,
    #[prost(bool, optional, tag = "12")]
    pub notify_scripts: Option<bool>,
    #[prost(string, optional, tag = "14")]
    pub parent_img: Option<String>,
    #[prost(bool, optional, tag = "15")]
    pub track_mem: Option<bool>,
    #[prost(bool, optional, tag = "18")]
    pub link_remap: Option<bool>,
    #[prost(bool, optional, tag = "26")]
    pub rst_sibling: Option<bool>,
    #[prost(message, repeated, tag = "27")]
    pub inherit_fd: Vec<InheritFd>,
    #[prost(int32, optional, tag = "34")]
    pub manage_cgroups_mode: Option<i32>,
    #[prost(uint32, optional, tag = "35")]
    pub ghost_limit: Option<u32>,
    #[prost(string, repeated, tag = "37")]
    pub external: Vec<String>,
    #[prost(uint32, optional, tag = "45")]
    pub timeout: Option<u32>,
    #[prost(bool, optional, tag = "46")]
    pub tcp_skip_in_flight: Option<bool>,
    #[prost(bool, optional, tag = "48")]
    pub lazy_pages: Option<bool>,
    #[prost(int32, optional, tag = "64")]
    pub network_lock: Option<i32>,
    #[prost(string, optional, tag = "68")]
    pub images_dir: Option<String>,
}

/// `criu_features`: which are asked for, and which are there.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Features {
    #[prost(bool, optional, tag = "1")]
    pub mem_track: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Request {
    #[prost(int32, required, tag = "1")]
    pub kind: i32,
    #[prost(message, optional, tag = "2")]
    pub opts: Option<Options>,
    #[prost(bool, optional, tag = "3")]
    pub notify_success: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    pub keep_open: Option<bool>,
    #[prost(message, optional, tag = "5")]
    pub features: Option<Features>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct RestoreResponse {
    #[prost(int32, required, tag = "1")]
    pub pid: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Notify {
    #[prost(string, optional, tag = "1")]
    pub script: Option<String>,
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct VersionResponse {
    #[prost(int32, required, tag = "1")]
    pub major: i32,
    #[prost(int32, required, tag = "2")]
    pub minor: i32,
    #[prost(int32, optional, tag = "4")]
    pub sublevel: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Response {
    #[prost(int32, required, tag = "1")]
    pub kind: i32,
    #[prost(bool, required, tag = "2")]
    pub success: bool,
    #[prost(message, optional, tag = "4")]
    pub restore: Option<RestoreResponse>,
    #[prost(message, optional, tag = "5")]
    pub notify: Option<Notify>,
    #[prost(int32, optional, tag = "7")]
    pub cr_errno: Option<i32>,
    #[prost(message, optional, tag = "8")]
    pub features: Option<Features>,
    #[prost(string, optional, tag = "9")]
    pub cr_errmsg: Option<String>,
    #[prost(message, optional, tag = "10")]
    pub version: Option<VersionResponse>,
}

/// What an answer of CRIU says, encoded anew; `None` when it is no answer. For
/// the fuzz targets, which have no CRIU.
#[doc(hidden)]
#[must_use]
pub fn reencoded_answer(packet: &[u8]) -> Option<Vec<u8>> {
    let response = Response::decode(packet).ok()?;
    Some(response.encode_to_vec())
}

/// Our end of the socket to one `criu swrk`.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: AsyncFd<OwnedFd>,
}

impl Socket {
    /// Takes a non-blocking `SOCK_SEQPACKET` socket.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let both = Interest::READABLE | Interest::WRITABLE;
        // SAFETY: an `OwnedFd` names the same open file for as long as the
        // `AsyncFd` holds it, and gives no access to replace it.
        let fd = unsafe { AsyncFd::register_with_interest(fd, both) }?;
        Ok(Self { fd })
    }

    /// A second descriptor of this end.
    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.fd.get_ref().try_clone()
    }

    /// Sends one message.
    pub(crate) async fn send(&self, request: &Request) -> io::Result<()> {
        let packet = request.encode_to_vec();
        self.fd
            .async_io(Interest::WRITABLE, |fd| {
                Ok(send(fd.as_raw_fd(), &packet, MsgFlags::MSG_NOSIGNAL)?)
            })
            .await
            .map(|_| ())
    }

    /// Receives one message, `None` at the end of the connection. Cancelling
    /// loses nothing. A descriptor that came along is closed by the kernel,
    /// since there is no room given for it.
    pub(crate) async fn receive(&self) -> io::Result<Option<Response>> {
        let mut packet = vec![0; RESPONSE_BYTES_MAX];
        let length = self
            .fd
            .async_io(Interest::READABLE, |fd| {
                match recv(fd.as_raw_fd(), &mut packet, MsgFlags::MSG_TRUNC) {
                    // A message left unread on the other side ends the connection.
                    Err(nix::errno::Errno::ECONNRESET) => Ok(0),
                    other => Ok(other?),
                }
            })
            .await?;
        if length == 0 {
            return Ok(None);
        }
        let packet = packet.get(..length).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                format!("answer of {length} bytes, at most {RESPONSE_BYTES_MAX} are allowed"),
            )
        })?;
        Response::decode(packet)
            .map(Some)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Bytes made by hand from `images/rpc.proto`, so that a wrong tag or type
    /// in a declaration above cannot cancel out.
    #[test]
    fn a_dump_request_has_the_bytes_criu_expects() {
        let request = Request {
            kind: kind::DUMP,
            opts: Some(Options {
                images_dir_fd: -1,
                pid: Some(300),
                ps: Some(PageServerInfo { fd: Some(7) }),
                parent_img: Some("p".into()),
                track_mem: Some(true),
                network_lock: Some(NETWORK_LOCK_SKIP),
                images_dir: Some("/i".into()),
                ..Options::default()
            }),
            ..Request::default()
        };
        let mut expected = vec![0x08, 1, 0x12, 31];
        expected.extend([0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1]);
        expected.extend([0x10, 0xac, 0x02]);
        expected.extend([0x5a, 2, 0x20, 7]);
        expected.extend([0x72, 1, b'p', 0x78, 1]);
        expected.extend([0x80, 0x04, 3]);
        expected.extend([0xa2, 0x04, 2, b'/', b'i']);
        assert_eq!(request.encode_to_vec(), expected);
    }

    #[test]
    fn features_are_asked_for_as_criu_expects() {
        let request = Request {
            kind: kind::FEATURE_CHECK,
            features: Some(Features {
                mem_track: Some(true),
            }),
            ..Request::default()
        };
        let asked = request.encode_to_vec();
        assert_eq!(asked, [0x08, 9, 0x2a, 2, 0x08, 1]);
        let answer = Response::decode(&[0x08, 9, 0x10, 1, 0x42, 2, 0x08, 0][..]).unwrap();
        assert_eq!(answer.features.unwrap().mem_track, Some(false));
    }

    #[test]
    fn an_answer_with_unknown_fields_is_understood() {
        // type NOTIFY, success, notify { script "post-dump", pid 5 }, field 200.
        let mut bytes = vec![0x08, 6, 0x10, 1, 0x2a, 13, 0x0a, 9];
        bytes.extend(b"post-dump");
        bytes.extend([0x10, 5, 0xc0, 0x0c, 1]);
        let response = Response::decode(&bytes[..]).unwrap();
        assert_eq!(response.kind, kind::NOTIFY);
        let notify = response.notify.unwrap();
        assert_eq!(
            (notify.script.as_deref(), notify.pid),
            (Some("post-dump"), Some(5))
        );
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(bytes: Vec<u8>) {
            let _ = Response::decode(&bytes[..]);
        }

        #[test]
        fn options_round_trip(
            pid: i32, external in prop::collection::vec("[a-z]{1,9}\\[[0-9]{1,9}\\]", 0..4),
            key: String, fd: i32, shell_job: bool,
        ) {
            let options = Options {
                images_dir_fd: -1,
                pid: Some(pid),
                external,
                inherit_fd: vec![InheritFd { key, fd }],
                shell_job: Some(shell_job),
                ..Options::default()
            };
            let bytes = options.encode_to_vec();
            prop_assert_eq!(Options::decode(&bytes[..]).unwrap(), options);
        }
    }
}
