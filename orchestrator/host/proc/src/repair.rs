//! TCP sockets of a tree whose CRIU has died, or that is to end in silence.
//!
//! CRIU reads connections in TCP repair mode. A CRIU that is killed meanwhile
//! leaves them in it: the tree can neither read nor write, and closes what its
//! peers still hold. [`TcpSockets::heal`] is what CRIU would have done.
//!
//! The same mode makes an end silent: a connection that is closed in it sends
//! neither FIN nor RST (Linux `tcp_disconnect`). [`TcpSockets::silence`] is for
//! a tree that runs elsewhere by now. And a restored socket leaves the mode
//! before its process runs an instruction, so connections that are all in it
//! belong to a copy that has never run.

use std::collections::BTreeMap;
use std::io;
use std::mem::size_of;
use std::net::TcpStream;
use std::os::fd::{AsRawFd as _, OwnedFd};

use migrate_core::Flow;
use migrate_core::parked::{Keepalive, Patience};

use crate::error::ProcError;
use crate::socket::borrow;
use crate::tree::descriptors_of;
use crate::{parse, read};

/// `setsockopt(SOL_TCP, TCP_REPAIR)`: on, and off with a window probe, which
/// makes the peer say what this side has missed.
const REPAIR_ON: i32 = 1;
const REPAIR_OFF: i32 = 0;

/// The TCP sockets of some processes, held open by this process.
#[derive(Debug)]
pub struct TcpSockets {
    connected: Vec<OwnedFd>,
    /// Local ports of listeners that allow their address to be used again.
    /// A connection has this from its listener, and the kernel forgets it for
    /// a socket that leaves repair mode.
    reusable_ports: Vec<u16>,
}

impl TcpSockets {
    /// Takes hold of the sockets; what ends meanwhile has none.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn of(pids: &[i32]) -> Result<Self, ProcError> {
        let mut sockets = BTreeMap::new();
        for &pid in pids {
            let directory = descriptors_of(pid);
            for fd in read::if_there(read::numbers(&directory))?.unwrap_or_default() {
                let link = read::if_there(read::link(directory.join(fd.to_string())))?;
                let inode = link.and_then(|link| parse::link_number(&link, "socket"));
                if let Some(inode) = inode {
                    sockets.entry(inode).or_insert((pid, fd));
                }
            }
        }
        let mut found = Self {
            connected: Vec::new(),
            reusable_ports: Vec::new(),
        };
        for (pid, fd) in sockets.into_values() {
            let Some(socket) = borrow(pid, fd) else {
                continue;
            };
            let is = |level, name| option(&socket, level, name).ok();
            if is(libc::SOL_SOCKET, libc::SO_PROTOCOL) != Some(libc::IPPROTO_TCP) {
                continue;
            }
            if is(libc::SOL_SOCKET, libc::SO_ACCEPTCONN) != Some(0) {
                if is(libc::SOL_SOCKET, libc::SO_REUSEADDR) == Some(1)
                    && let Some(port) = local_port(&socket)
                {
                    found.reusable_ports.push(port);
                }
                continue;
            }
            found.connected.push(socket);
        }
        Ok(found)
    }

    /// How many there are, without listeners.
    #[must_use]
    pub fn connected(&self) -> usize {
        self.connected.len()
    }

    /// How many of them are in repair mode.
    #[must_use]
    pub fn in_repair(&self) -> usize {
        self.connected.iter().filter(|fd| repairs(fd)).count()
    }

    /// Takes those in repair mode out of it; how many there were.
    ///
    /// # Errors
    /// When the kernel refuses one; the others are healed all the same.
    pub fn heal(&self) -> Result<usize, ProcError> {
        let broken: Vec<&OwnedFd> = self.connected.iter().filter(|fd| repairs(fd)).collect();
        let mut first_error = None;
        for socket in &broken {
            let healed =
                set(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, REPAIR_OFF).and_then(|()| {
                    let reusable =
                        local_port(socket).is_some_and(|port| self.reusable_ports.contains(&port));
                    set(
                        socket,
                        libc::SOL_SOCKET,
                        libc::SO_REUSEADDR,
                        i32::from(reusable),
                    )
                });
            if let Err(error) = healed {
                first_error.get_or_insert(error);
            }
        }
        done(broken.len(), first_error)
    }

    /// The timers of each connection that bound how long it bears silence.
    #[must_use]
    pub fn patience(&self) -> Vec<Patience> {
        self.connected.iter().filter_map(patience).collect()
    }

    /// Puts all into repair mode, so that their end is not heard by a peer.
    /// Keep this until the processes have ended.
    ///
    /// # Errors
    /// When the kernel refuses one.
    pub fn silence(&self) -> Result<usize, ProcError> {
        let mut first_error = None;
        for socket in &self.connected {
            if let Err(error) = set(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, REPAIR_ON) {
                first_error.get_or_insert(error);
            }
        }
        done(self.connected.len(), first_error)
    }
}

fn done(count: usize, error: Option<io::Error>) -> Result<usize, ProcError> {
    error.map_or(Ok(count), |source| Err(ProcError::Repair { source }))
}

fn repairs(socket: &OwnedFd) -> bool {
    option(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR).is_ok_and(|mode| mode == REPAIR_ON)
}

fn patience(socket: &OwnedFd) -> Option<Patience> {
    let stream = TcpStream::from(socket.try_clone().ok()?);
    let flow = Flow::new(stream.local_addr().ok()?, stream.peer_addr().ok()?);
    let tcp = |name| {
        let value = option(socket, libc::IPPROTO_TCP, name).ok()?;
        u32::try_from(value).ok()
    };
    let keepalive = match option(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE).ok()? {
        0 => None,
        _ => Some(Keepalive {
            idle_s: tcp(libc::TCP_KEEPIDLE)?,
            interval_s: tcp(libc::TCP_KEEPINTVL)?,
            probes: tcp(libc::TCP_KEEPCNT)?,
        }),
    };
    Some(Patience {
        flow,
        keepalive,
        user_timeout_ms: tcp(libc::TCP_USER_TIMEOUT)?,
    })
}

fn local_port(socket: &OwnedFd) -> Option<u16> {
    // Family and port lie at the same place for IPv4 and IPv6.
    // SAFETY: all zero is a valid value of this plain structure.
    let mut address: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
    let mut size = libc::socklen_t::try_from(size_of::<libc::sockaddr_in6>()).ok()?;
    // SAFETY: `address` and `size` are ours and as large as the call is told.
    let done =
        unsafe { libc::getsockname(socket.as_raw_fd(), (&raw mut address).cast(), &raw mut size) };
    (done == 0).then(|| u16::from_be(address.sin6_port))
}

fn option(socket: &OwnedFd, level: i32, name: i32) -> io::Result<i32> {
    let mut value = 0_i32;
    let mut size = libc::socklen_t::try_from(size_of::<i32>()).map_err(io::Error::other)?;
    // SAFETY: `value` and `size` are ours and as large as the call is told.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut size,
        )
    };
    if done == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn set(socket: &OwnedFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let size = libc::socklen_t::try_from(size_of::<i32>()).map_err(io::Error::other)?;
    // SAFETY: `value` is ours and as large as the call is told.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A process that has our end of a connection as its standard input, and
    /// the peer's end, which stays here.
    fn holder() -> (Child, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (ours, _) = listener.accept().unwrap();
        let mut child = Command::new("sleep")
            .arg("1000")
            .stdin(OwnedFd::from(ours))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Whoever starts a program goes on before it has closed what is not for
        // it. The words of its command line come last.
        let line = format!("/proc/{}/cmdline", child.id());
        while std::fs::read(&line).unwrap() != b"sleep\x001000\0" {
            assert!(child.try_wait().unwrap().is_none(), "it has ended");
            std::thread::yield_now();
        }
        (child, peer)
    }

    fn is_root() -> bool {
        let root = nix::unistd::geteuid().is_root();
        if !root {
            println!("SKIP repair: needs root");
        }
        root
    }

    #[test]
    fn a_silenced_end_is_not_heard_and_a_healed_one_is() {
        if !is_root() {
            return;
        }
        for heal in [false, true] {
            let (mut child, mut peer) = holder();
            let sockets = TcpSockets::of(&[child.id().cast_signed()]).unwrap();
            assert_eq!((sockets.connected(), sockets.in_repair()), (1, 0));
            assert_eq!(sockets.silence().unwrap(), 1);
            assert_eq!(sockets.in_repair(), 1);
            if heal {
                assert_eq!(sockets.heal().unwrap(), 1);
                assert_eq!((sockets.in_repair(), sockets.heal().unwrap()), (0, 0));
                peer.write_all(b"x").unwrap();
            }
            child.kill().unwrap();
            child.wait().unwrap();
            drop(sockets);
            // The other end hears FIN or RST of an end that speaks.
            peer.set_nonblocking(true).unwrap();
            let heard = peer.read(&mut [0; 1]);
            let silent = heard.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
            assert_eq!(silent, !heal);
        }
    }
}
