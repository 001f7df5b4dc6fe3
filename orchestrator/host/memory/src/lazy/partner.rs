//! What the process that serves memory and the one that has started it tell
//! each other, so that either can do without the other.
//!
//! The second holds a duplicate of every userfaultfd and an account of what is
//! lacking that is as true as the server's own: the server passes on every event
//! as soon as it has read it. Messages stay readable when their sender has died, and
//! what it had read and not yet passed on is in the [`Slate`].

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::LazyReport;
use super::sys::{self, EVENTS_BYTES, Event};
use crate::arena::memory_file;

/// Words of a message: what it is, and up to five numbers and one more.
const WORDS: usize = 8;

/// Bytes of the longest text in a message.
const TEXT_BYTES_MAX: usize = 512;

/// Descriptors that come with the order: CRIU's socket, the pages, the plan, the
/// slate, three for what is not on this host yet, and whatever else has to stay
/// open.
pub(super) const ORDER_FDS: usize = 8;

/// A message. Numbers are ids of address spaces unless another name is given.
#[derive(Debug)]
pub(super) enum Said {
    /// Serve; to the server. Comes with [`ORDER_FDS`] descriptors.
    Order,
    /// CRIU has connected; comes with that connection, which CRIU must not find
    /// closed: it would give the copy up.
    Criu,
    /// A task was handed over by CRIU; comes with its userfaultfd.
    Task { id: u64, pid: u32 },
    /// A process was forked; comes with its userfaultfd.
    Fork { id: u64, parent: u64 },
    /// Pages have moved.
    Remap {
        id: u64,
        from: u64,
        to: u64,
        bytes: u64,
    },
    /// Pages were given up.
    Remove { id: u64, start: u64, end: u64 },
    /// CRIU has handed over every task that lacks memory.
    HandedOver,
    /// The tree may run.
    Runs,
    /// Nothing is lacking: close the duplicate. Said back when that is done.
    Complete { id: u64 },
    /// It is done.
    End(LazyReport),
    /// It has failed; the text says why.
    Failed(String),
    /// Another process has the same descriptors; comes with what stands for it.
    Holder,
}

impl Said {
    /// How an event of the address space `id` is passed on; forked memory gets the id
    /// after `last_id`. Faults are passed on to nobody. The keeper says it, and who goes
    /// on for it has to come to the same.
    pub(super) fn of(event: &Event, id: u64, last_id: &mut u64) -> Option<Self> {
        Some(match *event {
            Event::Fault(_) => return None,
            Event::Fork(_) => {
                *last_id += 1;
                Self::Fork {
                    id: *last_id,
                    parent: id,
                }
            }
            Event::Remap { from, to, bytes } => Self::Remap {
                id,
                from,
                to,
                bytes,
            },
            Event::Remove { start, end } => Self::Remove { id, start, end },
        })
    }

    fn encode(&self) -> Vec<u8> {
        let mut words = [0u64; WORDS];
        let mut text: &[u8] = &[];
        match self {
            Self::Order => words[0] = 1,
            Self::Task { id, pid } => words[..3].copy_from_slice(&[2, *id, u64::from(*pid)]),
            Self::Fork { id, parent } => words[..3].copy_from_slice(&[3, *id, *parent]),
            Self::Remap {
                id,
                from,
                to,
                bytes,
            } => words[..5].copy_from_slice(&[4, *id, *from, *to, *bytes]),
            Self::Remove { id, start, end } => {
                words[..4].copy_from_slice(&[5, *id, *start, *end]);
            }
            Self::HandedOver => words[0] = 6,
            Self::Runs => words[0] = 7,
            Self::Complete { id } => words[..2].copy_from_slice(&[8, *id]),
            Self::End(report) => {
                words[..8].copy_from_slice(&[
                    9,
                    u64::from(report.tasks),
                    u64::from(report.forks),
                    u64::from(report.ended),
                    report.faults,
                    report.filled_pages,
                    report.took_us,
                    report.found_pages,
                ]);
            }
            Self::Failed(why) => {
                words[0] = 10;
                text = &why.as_bytes()[..why.len().min(TEXT_BYTES_MAX)];
            }
            Self::Criu => words[0] = 11,
            Self::Holder => words[0] = 12,
        }
        let mut packet: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        packet.extend_from_slice(text);
        packet
    }

    fn decode(packet: &[u8]) -> Option<Self> {
        let (head, text) = packet.split_at_checked(WORDS * 8)?;
        let mut words = [0u64; WORDS];
        for (word, bytes) in words.iter_mut().zip(head.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().ok()?);
        }
        let [kind, a, b, c, d, e, f, g] = words;
        let small = |word: u64| u32::try_from(word).ok();
        Some(match kind {
            1 => Self::Order,
            2 => Self::Task {
                id: a,
                pid: small(b)?,
            },
            3 => Self::Fork { id: a, parent: b },
            4 => Self::Remap {
                id: a,
                from: b,
                to: c,
                bytes: d,
            },
            5 => Self::Remove {
                id: a,
                start: b,
                end: c,
            },
            6 => Self::HandedOver,
            7 => Self::Runs,
            8 => Self::Complete { id: a },
            9 => Self::End(LazyReport {
                tasks: small(a)?,
                forks: small(b)?,
                ended: small(c)?,
                faults: d,
                filled_pages: e,
                took_us: f,
                found_pages: g,
            }),
            10 => Self::Failed(String::from_utf8_lossy(text).into_owned()),
            11 => Self::Criu,
            12 => Self::Holder,
            _ => return None,
        })
    }
}

/// What was heard.
pub(super) enum Heard {
    Said(Said, Vec<OwnedFd>),
    /// Nothing yet.
    Nothing,
    /// The other one has ended, or hung up.
    Gone,
}

/// How long one who does not read is waited for, in milliseconds; the tree's
/// faults wait as long, once.
const PATIENCE_MS: i32 = 500;

/// Bytes of messages that may be under way: some thousand.
const BACKLOG_BYTES: i32 = 4 << 20;

/// Sends a message. One who does not read for a while is as good as gone.
pub(super) fn say(socket: BorrowedFd<'_>, said: &Said, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let packet = said.encode();
    match sys::send(socket, &packet, fds) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            sys::await_room(socket, PATIENCE_MS);
            sys::send(socket, &packet, fds)
        }
        other => other,
    }
}

/// Receives a message; waits for it if `wait` is set.
pub(super) fn hear(socket: BorrowedFd<'_>, wait: bool) -> io::Result<Heard> {
    let mut packet = [0u8; WORDS * 8 + TEXT_BYTES_MAX];
    match sys::receive_all(socket, &mut packet, wait)? {
        None => Ok(Heard::Nothing),
        Some((0, _)) => Ok(Heard::Gone),
        Some((length, fds)) => match Said::decode(&packet[..length]) {
            Some(said) => Ok(Heard::Said(said, fds)),
            None => Err(io::ErrorKind::InvalidData.into()),
        },
    }
}

/// What both see at all times, also when the server has died.
#[derive(Debug)]
pub(super) struct Slate {
    at: *mut Words,
}

/// The start of the slate.
#[repr(C)]
struct Words {
    bits: AtomicU32,
    /// Of what was read last: how many events its partner was told of before.
    told: AtomicU64,
    /// Whose events they are.
    space: AtomicU64,
    /// The id that an address space got last.
    last_id: AtomicU64,
}

/// Events that the server may not have passed on.
#[derive(Debug)]
pub(super) struct Unsaid {
    pub(super) told: u64,
    pub(super) space: u64,
    pub(super) last_id: u64,
    pub(super) events: Vec<Event>,
}

// SAFETY: atomics in shared memory, and a buffer that is used as `Slate::read` and
// `Slate::unsaid` say.
unsafe impl Send for Slate {}
// SAFETY: as above.
unsafe impl Sync for Slate {}

impl Slate {
    const BYTES: usize = 4096;
    const NAME: &CStr = c"migrate-slate";

    /// Where events are, behind the words.
    const EVENTS_AT: usize = 1024;

    /// Events may have been read that nobody was told of.
    pub(super) const READING: u32 = 1;

    /// The server has given up its partner.
    pub(super) const ALONE: u32 = 2;

    /// Part of what CRIU said about a task was taken that nobody was told of.
    pub(super) const HEARING: u32 = 4;

    /// A new one, and the file to share it by.
    pub(super) fn new() -> io::Result<(Self, File)> {
        let file = memory_file(Self::NAME)?;
        file.set_len(Self::BYTES as u64)?;
        Ok((Self::of(file.as_fd())?, file))
    }

    pub(super) fn of(file: BorrowedFd<'_>) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // What the kernel writes to must not have to be fetched first: one who is
        // killed meanwhile would not get it. Where that is not allowed, it is there
        // nearly always.
        // SAFETY: mapped above, as long as that.
        unsafe { libc::mlock(at, Self::BYTES) };
        Ok(Self { at: at.cast() })
    }

    fn words(&self) -> &Words {
        // SAFETY: mapped, aligned to a page, longer than that, and only ever used as
        // atomics.
        unsafe { &*self.at }
    }

    fn buffer(&self) -> *mut u8 {
        const { assert!(size_of::<Words>() <= Self::EVENTS_AT) };
        const { assert!(Self::EVENTS_AT + EVENTS_BYTES <= Self::BYTES) };
        self.at.cast::<u8>().wrapping_add(Self::EVENTS_AT)
    }

    pub(super) fn set(&self, bit: u32, on: bool) {
        let bits = &self.words().bits;
        if on {
            bits.fetch_or(bit, Ordering::SeqCst);
        } else {
            bits.fetch_and(!bit, Ordering::SeqCst);
        }
    }

    pub(super) fn has(&self, bit: u32) -> bool {
        self.words().bits.load(Ordering::SeqCst) & bit != 0
    }

    /// Reads events of the address space `space` to where they outlive this process,
    /// whose only thread that does so calls this. Until [`Self::READING`] is taken
    /// back the partner would look at them.
    ///
    /// The kernel takes an event from its queue and writes it down in one system
    /// call, which a signal that kills does not cut short.
    pub(super) fn read(
        &self,
        uffd: BorrowedFd<'_>,
        (told, space, last_id): (u64, u64, u64),
    ) -> io::Result<Vec<Event>> {
        let words = self.words();
        // SAFETY: within the mapping; the one thread that is in here is the only one
        // that uses it, for the partner does so when this process has died.
        let buffer = unsafe { std::slice::from_raw_parts_mut(self.buffer(), EVENTS_BYTES) };
        buffer.fill(0);
        words.told.store(told, Ordering::SeqCst);
        words.space.store(space, Ordering::SeqCst);
        words.last_id.store(last_id, Ordering::SeqCst);
        self.set(Self::READING, true);
        sys::read_events(uffd, buffer)?;
        Ok(sys::events(buffer))
    }

    /// What a server that has died had read last and may not have passed on.
    pub(super) fn unsaid(&self) -> Option<Unsaid> {
        let words = self.words();
        self.has(Self::READING).then(|| Unsaid {
            told: words.told.load(Ordering::SeqCst),
            space: words.space.load(Ordering::SeqCst),
            last_id: words.last_id.load(Ordering::SeqCst),
            // SAFETY: within the mapping, and nobody writes to it any more.
            events: sys::events(unsafe { std::slice::from_raw_parts(self.buffer(), EVENTS_BYTES) }),
        })
    }
}

impl Drop for Slate {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`; no reference outlives `self`.
        unsafe { libc::munmap(self.at.cast(), Self::BYTES) };
    }
}

/// The one that has started the server, as the server sees him.
#[derive(Debug)]
pub(super) struct Partner {
    pub(super) socket: OwnedFd,
    pub(super) slate: Slate,
    /// When this process is to die, in a test.
    pub(super) death: Option<Death>,
}

/// A moment at which only a keeper knows of something.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Death {
    /// It has read of this many events, the last of which it has told nobody of.
    AtEvent(u64),
    /// It has told of the last word of CRIU and not taken it.
    AtLastWord,
}

impl Partner {
    /// Ends this process as `kill -9` does, if it is to die now.
    pub(super) fn may_die(&self, now: impl Fn(Death) -> bool) {
        if self.death.is_some_and(now) {
            // SAFETY: the call takes no pointer.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
    }

    /// Whether the process under test puts in place what nobody waits for. One that
    /// is to die at an event would often have nothing left to do when it came.
    pub(super) fn fills(&self) -> bool {
        !matches!(self.death, Some(Death::AtEvent(_)))
    }

    /// A pair of connected sockets that keep messages apart.
    pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
        let mut fds = [0; 2];
        let bytes = BACKLOG_BYTES;
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        // SAFETY: room for two descriptors, which are new and ours.
        unsafe {
            if libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) < 0 {
                return Err(io::Error::last_os_error());
            }
            for fd in fds {
                // Without it there is less room, and no harm.
                libc::setsockopt(
                    fd,
                    libc::SOL_SOCKET,
                    libc::SO_SNDBUFFORCE,
                    (&raw const bytes).cast(),
                    4,
                );
            }
            Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_heard() {
        let (one, other) = Partner::pair().unwrap();
        let all = [
            Said::Order,
            Said::Criu,
            Said::Task { id: 1, pid: 2 },
            Said::Fork { id: 3, parent: 1 },
            Said::Remap {
                id: 1,
                from: u64::MAX,
                to: 2,
                bytes: 3,
            },
            Said::Remove {
                id: 1,
                start: 4,
                end: 5,
            },
            Said::HandedOver,
            Said::Runs,
            Said::Complete { id: 9 },
            Said::End(LazyReport {
                tasks: 1,
                forks: 2,
                ended: 3,
                faults: 4,
                filled_pages: 5,
                took_us: 6,
                found_pages: 7,
            }),
            Said::Failed("why".to_owned()),
            Said::Holder,
        ];
        for said in &all {
            say(one.as_fd(), said, &[other.as_fd()]).unwrap();
        }
        // What was said is heard when the speaker is gone.
        drop(one);
        for said in &all {
            let Heard::Said(heard, fds) = hear(other.as_fd(), false).unwrap() else {
                panic!("{said:?}");
            };
            assert_eq!(format!("{heard:?}"), format!("{said:?}"));
            assert_eq!(fds.len(), 1);
        }
        assert!(matches!(hear(other.as_fd(), true).unwrap(), Heard::Gone));
    }

    #[test]
    fn one_who_does_not_listen_is_not_waited_for_for_long() {
        let (one, _other) = Partner::pair().unwrap();
        let error = loop {
            if let Err(error) = say(one.as_fd(), &Said::Runs, &[]) {
                break error;
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
