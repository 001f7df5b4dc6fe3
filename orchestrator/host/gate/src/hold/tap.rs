//! TAP devices: packets moved to one can be read from its file, and what is
//! written to the file appears as received by the device.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;

use crate::sys;

const DEVICE: &str = "/dev/net/tun";

/// The kernel's ring holds this many frames until they are read; a thread does
/// nothing else (see [`super::reader`]).
const RING_FRAMES: libc::c_int = 4096;
/// The largest that a TAP takes: 65535 less the Ethernet header.
const MTU_BYTES: libc::c_int = 65_521;

/// A TAP device, which goes with this value.
#[derive(Debug)]
pub(crate) struct Tap {
    file: File,
    pub(crate) name: String,
    pub(crate) index: u32,
}

impl Tap {
    /// Makes the device in the calling thread's network namespace. It is down.
    pub(crate) fn create(name: &str) -> io::Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(DEVICE)?;
        let mut request = sys::interface_request(name)?;
        // Exclusive: never somebody else's device of this name.
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
        request.ifr_ifru.ifru_flags = short(flags)?;
        // SAFETY: a live descriptor, and a valid request with a terminated name.
        Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
        // Packets merged by the interface and checksums not yet made stay so:
        // the header in front of each frame tells, and is given back as it is.
        let offload = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        // SAFETY: a live descriptor; the argument is a number.
        Errno::result(unsafe {
            libc::ioctl(
                file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offload),
            )
        })?;
        // That header may travel to a host with another byte order.
        let little_endian: libc::c_int = 1;
        // SAFETY: a live descriptor, and an int that outlives the call.
        Errno::result(unsafe {
            libc::ioctl(
                file.as_raw_fd(),
                libc::TUNSETVNETLE,
                &raw const little_endian,
            )
        })?;
        let index = nix::net::if_::if_nametoindex(name)?;
        Ok(Self {
            file,
            name: name.to_owned(),
            index,
        })
    }

    /// Makes the device ready for packets. It says nothing of its own accord:
    /// no address, no neighbour discovery, no ARP.
    pub(crate) fn raise(&self) -> io::Result<()> {
        let switch = format!("/proc/sys/net/ipv6/conf/{}/disable_ipv6", self.name);
        match fs::write(switch, "1") {
            Ok(()) => {}
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // What the device says by itself is told apart when it is read.
            Err(error) => tracing::debug!(%error, device = self.name, "IPv6 stays on"),
        }
        let socket = sys::interface_socket()?;
        let mut request = sys::interface_request(&self.name)?;
        let mut set = |what, value| {
            request.ifr_ifru = value;
            // SAFETY: a live descriptor, and a valid request with a terminated
            // name and the member that the call reads.
            Errno::result(unsafe { libc::ioctl(socket.as_raw_fd(), what, &raw mut request) })
                .map(drop)
        };
        set(
            libc::SIOCSIFMTU,
            libc::__c_anonymous_ifr_ifru {
                ifru_mtu: MTU_BYTES,
            },
        )?;
        set(
            libc::SIOCSIFTXQLEN,
            libc::__c_anonymous_ifr_ifru {
                ifru_metric: RING_FRAMES,
            },
        )?;
        let flags = short(libc::IFF_UP | libc::IFF_NOARP)?;
        set(
            libc::SIOCSIFFLAGS,
            libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
        )?;
        Ok(())
    }

    /// The next frame's length, `None` when there is none now.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            match nix::unistd::read(&self.file, buffer) {
                Ok(bytes) => return Ok(Some(bytes)),
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    pub(crate) fn write(&self, frame: &[u8]) -> io::Result<()> {
        loop {
            match nix::unistd::write(&self.file, frame) {
                Ok(bytes) if bytes == frame.len() => return Ok(()),
                Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// The kernel's flags fill 16 bits, the highest included.
fn short(flags: libc::c_int) -> io::Result<libc::c_short> {
    u16::try_from(flags)
        .map(u16::cast_signed)
        .map_err(io::Error::other)
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
