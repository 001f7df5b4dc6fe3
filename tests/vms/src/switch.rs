//! The network between the machines: a switch in this process, on sockets of the file system.
//!
//! QEMU sends each frame as a datagram to the switch's socket for that machine, and takes those
//! that come to its own. Nothing else is on this network, and nothing leads out of it.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::{Attempt, Result};

/// An Ethernet frame with a tag; QEMU's virtio device makes none that is longer.
const FRAME_BYTES_MAX: usize = 64 * 1024;
/// A machine that takes nothing for so long loses the frame, as on any network.
const SEND_WITHIN: Duration = Duration::from_millis(200);
/// Between two looks at whether the switch is still wanted, in milliseconds.
const LOOK_AGAIN_MS: u16 = 200;

/// Where a machine's end of a cable is.
pub(crate) fn plug(dir: &Path, machine: &str) -> PathBuf {
    dir.join(format!("{machine}.nic"))
}

/// Where the switch's end is.
pub(crate) fn socket(dir: &Path, machine: &str) -> PathBuf {
    dir.join(format!("{machine}.port"))
}

/// A running switch; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Switch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

struct Port {
    socket: UnixDatagram,
    plug: PathBuf,
    address: [u8; 6],
}

impl Switch {
    /// With a port for each machine, which has this hardware address.
    pub(crate) fn start(dir: &Path, machines: &[(&str, [u8; 6])]) -> Result<Self> {
        let mut ports = Vec::with_capacity(machines.len());
        for (machine, address) in machines {
            let path = socket(dir, machine);
            let socket =
                UnixDatagram::bind(&path).attempt(|| format!("bind {}", path.display()))?;
            socket
                .set_write_timeout(Some(SEND_WITHIN))
                .attempt(|| "set up the switch".to_owned())?;
            ports.push(Port {
                socket,
                plug: plug(dir, machine),
                address: *address,
            });
        }
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("switch".to_owned())
            .spawn(move || {
                let mut frame = vec![0; FRAME_BYTES_MAX];
                while !stopped.load(Ordering::Relaxed) {
                    if forward(&ports, &mut frame).is_err() {
                        break;
                    }
                }
            })
            .attempt(|| "start the switch".to_owned())?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

/// Waits for frames and sends on one of each port that has some.
fn forward(ports: &[Port], frame: &mut [u8]) -> io::Result<()> {
    let mut polled: Vec<PollFd<'_>> = ports
        .iter()
        .map(|port| PollFd::new(port.socket.as_fd(), PollFlags::POLLIN))
        .collect();
    poll(&mut polled, PollTimeout::from(LOOK_AGAIN_MS))?;
    let ready: Vec<bool> = polled.iter().map(|fd| fd.any().unwrap_or(false)).collect();
    for (from, port) in ports.iter().enumerate().filter(|(at, _)| ready[*at]) {
        let length = port.socket.recv(frame)?;
        let frame = &frame[..length];
        for (to, other) in ports.iter().enumerate() {
            if to != from && is_for(frame, other.address, ports) {
                // A machine that is not up yet, or gone, gets nothing.
                let _ = port.socket.send_to(frame, &other.plug);
            }
        }
    }
    Ok(())
}

/// Groups and addresses that no port has go everywhere.
fn is_for(frame: &[u8], address: [u8; 6], ports: &[Port]) -> bool {
    let Some(to) = frame.first_chunk::<6>() else {
        return false;
    };
    *to == address || to[0] & 1 == 1 || ports.iter().all(|port| port.address != *to)
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
