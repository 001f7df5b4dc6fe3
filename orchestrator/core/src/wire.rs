//! What source and destination say to each other.
//!
//! A frame is a header of eight bytes and a body: `u32` length of the body,
//! little endian, `u8` kind, three bytes zero. Control bodies are postcard;
//! page and image bodies have a short fixed head and raw bytes after it, so
//! that the bulk of a migration is never parsed.
//!
//! ```text
//! source                              destination
//!   Hello            ------------------>
//!                    <------------------  Hello
//!   Preflight(tree)  ------------------>
//!                    <------------------  Findings
//!   Prepare          ------------------>  gate closed, address staged, CRIU warm
//!                    <------------------  Prepared
//!   Join             ~~~~~~~~~~~~~~~~~~>  further connections
//!                    <~~~~~~~~~~~~~~~~~~  Joined
//!   Streams          ------------------>  from here over all connections in turn
//!   Pages ...        ------------------>  rounds, while the tree runs
//!   Gone             ------------------>  what is unmapped since they were sent
//!   RoundSent        ------------------>  after each round
//!                    <------------------  RoundStored
//!   Frozen           ------------------>
//!   Pages ...        ------------------>  as CRIU writes them
//!   Image ...        ------------------>
//!   Flows            ------------------>
//!   Dumped           ------------------>  restore, held before its first instruction;
//!                                         the further connections end
//!                    <------------------  Restored
//!   Go               ------------------>  ===== the commit =====
//!                    <------------------  Owned
//!                    <------------------  Running
//!   (end)            ------------------>
//!                    <------------------  Seen
//!                    <------------------  Adopted   where a unit takes the tree
//! ```
//! With `--postcopy` one more connection joins, and from `Owned` on:
//!
//! ```text
//! source                              destination
//!                    <------------------  Want    what the copy waits for
//!   Pages ...        ------------------>  that first, then all others
//!                    <------------------  Arrived
//! ```
//! A tree that is only to be kept there (`migrate park --to`) goes the same way:
//!
//! ```text
//! source                              keeper
//!   Keep             ------------------>  before Preflight
//!   Patience ...     ------------------>
//!   Preflight ...    as above
//!                    <------------------  Store, Prepared
//!   Dumped           ------------------>  images on the disk, hashed
//!                    <------------------  Manifest ...
//!                    <------------------  Restored
//!   Go               ------------------>  ===== the commit: the manifest's rename =====
//! ```
//! and comes back over connections of their own:
//!
//! ```text
//!   Kept             ------------------>  complete? / its images / it runs again
//!                    <------------------  VerdictIs / Image ..., Given / VerdictIs
//! ```
//! At any time before `Go`: `Abort` from the source, `Failed` from the
//! destination, or the end of the connection; each of them undoes everything
//! on the destination.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::facts::{HostFacts, TreeFacts};
use crate::flow::Flow;
use crate::journal::Stage;
use crate::parked::{Keep, KeptQuestion, Patience, StoreId};
use crate::phase::Phase;
use crate::preflight::Finding;
use crate::report::FlowSeen;
use crate::timeline::Timing;
use crate::tracked::Tracked;
use crate::unit::AdoptChoice;

/// Version of this protocol; both sides must have the same.
pub const PROTOCOL_VERSION: u32 = 1;

/// Bytes of a frame's header.
pub const FRAME_HEADER_BYTES: usize = 8;

/// The largest body a peer may announce: 4 MiB of pages and their head.
pub const FRAME_BODY_BYTES_MAX: usize = (4 << 20) + 64;

/// The largest packet: `virtio_net_hdr`, an Ethernet header with two tags, and
/// the largest IP packet that segmentation offload makes (64 KiB; `BIG TCP`
/// packets are not held).
pub const PACKET_BYTES_MAX: usize = 12 + 22 + 65_536;

/// The largest control message.
pub const CONTROL_BYTES_MAX: usize = 4 << 20;

/// The size of a page as CRIU counts them on the architectures supported.
pub const PAGE_BYTES: usize = 4096;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// A [`Message`].
    Control = 1,
    /// A [`PageRun`] and, when it is present, its pages.
    Pages = 2,
    /// A piece of an image file.
    Image = 3,
    /// A packet that the source held back, as its interface showed it.
    Packet = 4,
}

/// A header that no version of this protocol sends.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum FrameError {
    /// The kind is none of [`FrameKind`].
    #[error("unknown frame kind {0}")]
    UnknownKind(u8),
    /// The reserved bytes are not zero.
    #[error("reserved bytes of the frame header are not zero")]
    Reserved,
    /// The body would be larger than allowed.
    #[error("frame of {announced} bytes, at most {limit} are allowed")]
    TooLarge {
        /// Announced length in bytes.
        announced: usize,
        /// Limit in bytes.
        limit: usize,
    },
    /// The body does not have the form of its kind.
    #[error("malformed {what}")]
    Malformed {
        /// Which part.
        what: &'static str,
    },
}

/// Encodes a frame's header.
///
/// # Errors
///
/// The body is larger than [`FRAME_BODY_BYTES_MAX`].
pub fn encode_header(
    kind: FrameKind,
    body_bytes: usize,
) -> Result<[u8; FRAME_HEADER_BYTES], FrameError> {
    let too_large = FrameError::TooLarge {
        announced: body_bytes,
        limit: FRAME_BODY_BYTES_MAX,
    };
    if body_bytes > FRAME_BODY_BYTES_MAX {
        return Err(too_large);
    }
    let length = u32::try_from(body_bytes)
        .map_err(|_| too_large)?
        .to_le_bytes();
    Ok([
        length[0], length[1], length[2], length[3], kind as u8, 0, 0, 0,
    ])
}

/// Decodes a frame's header into its kind and the length of its body.
///
/// # Errors
///
/// See [`FrameError`].
pub fn decode_header(header: [u8; FRAME_HEADER_BYTES]) -> Result<(FrameKind, usize), FrameError> {
    let [l0, l1, l2, l3, kind, r0, r1, r2] = header;
    let kind = match kind {
        1 => FrameKind::Control,
        2 => FrameKind::Pages,
        3 => FrameKind::Image,
        4 => FrameKind::Packet,
        other => return Err(FrameError::UnknownKind(other)),
    };
    if [r0, r1, r2] != [0; 3] {
        return Err(FrameError::Reserved);
    }
    let announced = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    let limit = match kind {
        FrameKind::Control => CONTROL_BYTES_MAX,
        FrameKind::Pages | FrameKind::Image => FRAME_BODY_BYTES_MAX,
        FrameKind::Packet => PACKET_BYTES_MAX,
    };
    if announced > limit {
        return Err(FrameError::TooLarge { announced, limit });
    }
    Ok((kind, announced))
}

/// A control message, in either direction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// First message of each side.
    Hello(Hello),
    /// The tree and the host it comes from.
    Preflight {
        /// The tree.
        tree: Box<TreeFacts>,
        /// The source host.
        source: Box<HostFacts>,
        /// What to do with standard streams that lead out of the tree.
        stdio: StdioChoice,
        /// Which unit is to have it.
        adopt: AdoptChoice,
    },
    /// The destination's view; nothing has been changed there yet.
    Findings {
        /// One line per check.
        findings: Vec<Finding>,
        /// The destination host.
        destination: Box<HostFacts>,
    },
    /// Get ready for the tree last sent with `Preflight`.
    Prepare {
        /// How long the tree may stand still, in milliseconds.
        blackout_limit_ms: u64,
        /// `Dumped` will come with digests to compare with.
        verify: bool,
        /// Connections that will carry pages, this one among them.
        streams: u32,
        /// When the copy gets its memory.
        restore: RestoreChoice,
        /// What keeps packets from the tree; the destination's gate holds them
        /// only for its own kind.
        lock: NetworkLock,
        /// Pages may come after `Go`, over a further connection of their own.
        postcopy: bool,
    },
    /// Gate closed, address staged, CRIU warm.
    Prepared,
    /// What rounds have sent of these pages is of no use any more: the tree has unmapped
    /// them, or who had them has ended. Frames come in order: what comes later for the same
    /// pages is kept.
    Gone {
        /// Whose.
        owner: PageOwner,
        /// First page, as address over [`PAGE_BYTES`], and count; at most
        /// [`GONE_RANGES_MAX`].
        pages: Vec<(u64, u64)>,
    },
    /// A round's pages have been sent.
    RoundSent,
    /// They are in store, and nothing is on its way any more. What connections hold of
    /// compressed pages may be many times as much, and would have to be stored in the
    /// blackout.
    RoundStored,
    /// The rounds are over: pages that come from here on are CRIU's final
    /// list, and what it leaves out is in store.
    Frozen,
    /// Connections found when the tree stood still, the earlier ones among
    /// them; they replace the list of `Preflight`.
    Flows(Vec<Flow>),
    /// Connections that the tree has closed and the source's kernel had not
    /// done with: the destination knows nothing of them, and must not say so
    /// to their peers. What is said later of a flow replaces what was said
    /// before; the last word may come just before `Go`.
    Ended {
        /// Their peers may close them at any time yet.
        open: Vec<Flow>,
        /// Their peers have closed them, too, and may not know that this was
        /// heard.
        over: Vec<Flow>,
    },
    /// What the source's connection tracking knows of connections at the
    /// addresses that move.
    Tracked(Vec<Tracked>),
    /// Every page and image has been sent.
    Dumped {
        /// Pages with data that were sent, for the receiver to compare.
        pages: u64,
        /// Pages without data that were sent: in store, unchanged.
        in_store: u64,
        /// Image files that were sent.
        images: u32,
        /// With `--verify`, what the frozen tree's memory amounts to, task by
        /// task and segment by segment.
        digests: Vec<PageDigest>,
        /// Areas that do not count for them, as address and length in bytes:
        /// the kernel writes there while CRIU is at work.
        masks: Vec<(u64, u32)>,
        /// Pages that were named and come after `Go`; they are among `pages`.
        late: u64,
        /// What they amount to, as `digests`, in which they do not count.
        late_digests: Vec<PageDigest>,
    },
    /// The copy is complete and has not run.
    Restored {
        /// Time from `Dumped` to here, in microseconds.
        restore_us: u64,
    },
    /// Run it. The source never runs it again.
    Go,
    /// The destination has recorded that the tree is its own.
    Owned,
    /// The copy runs, its address is announced and its gate open.
    Running(RunningReport),
    /// The source gave up; undo everything.
    Abort {
        /// For the log.
        reason: String,
    },
    /// The destination gave up; it closes the connection when it has undone
    /// everything.
    Failed(WireError),
    /// On a connection of its own: who owns this migration's tree? An answer
    /// other than `Owned` or `Running` binds the destination never to run it.
    Verdict {
        /// The migration asked about.
        migration_id: String,
    },
    /// The answer to `Verdict`.
    VerdictIs(Stage),
    /// First message of a further connection: it belongs to the migration whose
    /// sides know this token, made from the keys of their first connection.
    /// Each token opens one connection.
    Join {
        /// The token.
        token: [u8; 32],
    },
    /// The answer to `Join`.
    Joined,
    /// All connections have joined; what follows comes over all of them
    /// ([`crate::stream`]), up to `Dumped`.
    Streams,
    /// The destination's last word, once the source has closed its half: what
    /// its gate has seen of each connection, at most [`FLOWS_SEEN_MAX`].
    Seen(Vec<FlowSeen>),
    /// The copy waits for these pages, as first number and count
    /// ([`crate::late::LateRuns`]); at most [`crate::late::WANTED_RANGES_MAX`].
    Want {
        /// The pages.
        pages: Vec<(u64, u64)>,
        /// How many pages have come over this connection so far; the source
        /// keeps no more than a few hundred on their way, so that what is wanted
        /// need not queue behind others.
        came: u64,
    },
    /// What has become of the tree's unit: follows [`Message::Seen`], or the end of
    /// the source's half, where [`RunningReport::adopting`] has said so.
    Adopted(Adopted),
    /// Every page that was to come has come: the source is not needed any more.
    Arrived {
        /// Faults of the copy that had to wait for a page still on the source.
        waited: u64,
    },
    /// In place of a destination's restore: keep the tree on a disk. Comes before
    /// `Preflight`.
    Keep(Box<Keep>),
    /// What is known of the patience of the tree's connections, as much as fits a
    /// message at a time; before `Preflight`.
    Patience(Vec<Patience>),
    /// The manifest of the set, as the keeper will put it in place at `Go`, piece
    /// by piece; before `Restored`.
    Manifest {
        /// Its next bytes, at most [`MANIFEST_PIECE_BYTES`].
        bytes: Vec<u8>,
        /// There are no more.
        last: bool,
    },
    /// Before `Prepared`: the store that the set is in.
    Store(StoreId),
    /// First message, of a connection of its own: about a set that is kept.
    /// Answered by `VerdictIs`, or by images and `Given`.
    Kept(KeptQuestion),
    /// Every image of the set has been sent.
    Given,
    /// What comes after `Go` of the next run that the list names as in store: what is in
    /// store of these pages is out of date. Several for one run where there are many.
    Follows {
        /// Whose.
        owner: PageOwner,
        /// First page, as address over [`PAGE_BYTES`], and count; ascending, at most
        /// [`crate::late::FOLLOWING_RANGES_MAX`].
        pages: Vec<(u64, u64)>,
    },
}

/// Bytes of a manifest in one message.
pub const MANIFEST_PIECE_BYTES: usize = 1 << 20;

/// Ranges of pages that one [`Message::Gone`] may name: with the largest numbers they fit a
/// control message.
pub const GONE_RANGES_MAX: usize = 1 << 16;

/// Connections in one [`Message::Seen`]: with their longest addresses they fit
/// a control message.
pub const FLOWS_SEEN_MAX: usize = 20_000;

/// Introduction of a side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`PROTOCOL_VERSION`].
    pub protocol: u32,
    /// Release of `migrate`, for messages.
    pub release: String,
    /// `uname -n`.
    pub hostname: String,
    /// The migration this connection belongs to: random, chosen by the source.
    pub migration_id: String,
}

/// What becomes of standard streams that lead out of the tree.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum StdioChoice {
    /// Only what can be carried as it is; anything else is refused.
    #[default]
    Keep,
    /// Attach to the destination's journal.
    Journal,
    /// Attach to `/dev/null`.
    Null,
    /// Append to this file on the destination.
    File(String),
}

/// What keeps peers' packets from the frozen tree.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkLock {
    /// Our gate: it holds them.
    #[default]
    Gate,
    /// CRIU, with nftables: they are dropped.
    Nftables,
    /// CRIU, with iptables: they are dropped.
    Iptables,
    /// Nothing, until the tree is handed over.
    Skip,
    /// Our gate: it drops them.
    Drop,
}

impl NetworkLock {
    /// Whether the gate keeps packets from the frozen tree.
    #[must_use]
    pub const fn is_gate(self) -> bool {
        matches!(self, Self::Gate | Self::Drop)
    }
}

/// When the copy gets its memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestoreChoice {
    /// While it runs where that pays, see [`RestoreChoice::is_lazy`].
    #[default]
    Auto,
    /// All of it before it runs.
    Eager,
    /// While it already runs, what its threads touch first.
    Lazy,
}

impl RestoreChoice {
    /// Redis with 20 MiB, moved six times each way in turns (release build, two
    /// cores): restored in 12 to 21 ms, peers silent for 65 to 81 ms; with all of
    /// its memory before it ran in 37 to 58 ms, peers silent for 84 to 119 ms.
    /// Less has not been measured, and has less to gain.
    pub const LAZY_FROM_BYTES: u64 = 16 << 20;

    /// Of the memory of several processes, how much they may have in common: one part in so
    /// many. It becomes pages of each when it arrives late, and the tree needs as much more.
    pub const LAZY_COMMON_PART: u64 = 16;

    /// Whether memory is to arrive while the copy runs, on a host that can do
    /// that. If nothing is said it does where each process has much on an average and little
    /// with others.
    #[must_use]
    pub fn is_lazy(self, tree: &TreeFacts) -> bool {
        match self {
            Self::Lazy => true,
            Self::Eager => false,
            Self::Auto => {
                let processes = tree.processes.len() as u64;
                let common_bytes = tree.common_bytes.saturating_mul(Self::LAZY_COMMON_PART);
                tree.resident_bytes >= Self::LAZY_FROM_BYTES.saturating_mul(processes)
                    && (processes < 2 || common_bytes <= tree.resident_bytes)
            }
        }
    }
}

/// What the destination measured, for the closing block.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningReport {
    /// Root PID of the running copy.
    pub root_pid: i32,
    /// From `Go` to the running tree, in microseconds.
    pub takeover_us: u64,
    /// Packets of peers that the destination's gate has held back.
    pub held_packets: u64,
    /// Packets dropped by the destination's gate.
    pub dropped_packets: u64,
    /// RST segments that the gate saw leave.
    pub rst_sent: u64,
    /// cgroup that the copy lives in.
    pub cgroup: String,
    /// Pages that were still to be put in place when the copy began to run.
    pub lazy_pages: u64,
    /// When it did what.
    pub timing: Timing,
    /// The tree is to get a unit, and [`Message::Adopted`] will follow.
    pub adopting: bool,
}

/// The unit that a moved tree runs in.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    /// Its name; none where no unit has taken the tree, which runs all the same.
    pub unit: Option<String>,
    /// What has not gone as it was to, with the way out.
    pub warning: Option<String>,
}

/// A failure as the other side needs it: what, where, why, never a local type.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[error("{phase} failed on {host}: {message}")]
pub struct WireError {
    /// The phase it happened in.
    pub phase: Phase,
    /// `uname -n` of the side that failed.
    pub host: String,
    /// The chain of causes, joined by colons.
    pub message: String,
    /// What the user can do.
    pub help: Option<String>,
}

/// A run of pages of one task or shared segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// Whose pages.
    pub owner: PageOwner,
    /// Address of the first page; offset into the segment for shared memory.
    pub vaddr: u64,
    /// Number of pages.
    pub pages: u64,
    /// CRIU's pagemap flags: 1 parent, 2 lazy, 4 present; or [`PageRun::ZERO`].
    pub flags: u32,
}

/// Whose memory a page belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PageOwner {
    /// Private memory of the task with this PID.
    Task(u32),
    /// A shared segment by CRIU's shmid.
    Shared(u64),
}

/// What the memory of a task, or a shared segment, amounts to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageDigest {
    /// Whose memory it is.
    pub owner: PageOwner,
    /// SHA-256 over addresses and content of its pages.
    pub sha256: [u8; 32],
    /// Pages that do not count, as address and length in bytes: the kernel has
    /// taken them since they were listed, as it may with what a task has given
    /// back with `MADV_FREE`.
    pub taken: Vec<(u64, u32)>,
}

impl std::fmt::Display for PageOwner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Task(pid) => write!(f, "task {pid}"),
            Self::Shared(id) => write!(f, "shared segment {id}"),
        }
    }
}

/// Bytes of an encoded [`PageRun`].
pub const PAGE_RUN_BYTES: usize = 40;

impl PageRun {
    /// Pages have data behind them (`PE_PRESENT`, CRIU `include/pagemap.h`).
    pub const PRESENT: u32 = 1 << 2;

    /// Pages hold nothing but zeros; no data follows. Not a flag of CRIU, whose
    /// flags have 16 bits on the wire.
    pub const ZERO: u32 = 1 << 16;

    /// Pages have data that comes after `Go`, with `--postcopy`; none follows
    /// here.
    pub const LATE: u32 = 1 << 17;

    /// Pages that the final list has named as in store; this is what they hold.
    pub const AGAIN: u32 = 1 << 18;

    /// `PE_LAZY` of CRIU's `include/pagemap.h`: the page may come after the
    /// restore.
    pub const LAZY: u32 = 1 << 1;

    /// Bytes of data that follow.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        if self.flags & Self::PRESENT == 0 {
            0
        } else {
            self.pages * PAGE_BYTES as u64
        }
    }

    /// What is left of it without these parts of it, which ascend and do not overlap.
    #[must_use]
    pub fn without(&self, parts: &[Self]) -> Vec<Self> {
        let page = PAGE_BYTES as u64;
        let end = |run: &Self| run.vaddr + run.pages * page;
        let starts = std::iter::once(self.vaddr).chain(parts.iter().map(end));
        let ends = parts.iter().map(|part| part.vaddr).chain([end(self)]);
        starts
            .zip(ends)
            .filter(|(start, end)| start < end)
            .map(|(start, end)| Self {
                vaddr: start,
                pages: (end - start) / page,
                ..*self
            })
            .collect()
    }

    /// Encodes the head of a page frame.
    #[must_use]
    pub fn encode(&self) -> [u8; PAGE_RUN_BYTES] {
        let (kind, id) = match self.owner {
            PageOwner::Task(pid) => (1u64, u64::from(pid)),
            PageOwner::Shared(id) => (2u64, id),
        };
        let mut out = [0; PAGE_RUN_BYTES];
        for (slot, value) in
            out.chunks_exact_mut(8)
                .zip([kind, id, self.vaddr, self.pages, u64::from(self.flags)])
        {
            slot.copy_from_slice(&value.to_le_bytes());
        }
        out
    }

    /// Decodes the head of a page frame and checks it against the bytes that follow.
    ///
    /// # Errors
    ///
    /// Unknown owner, more pages than a frame can hold, unaligned address, an
    /// end beyond all addresses, or a length that does not match.
    pub fn decode(body: &[u8]) -> Result<(Self, &[u8]), FrameError> {
        const MALFORMED: FrameError = FrameError::Malformed { what: "page run" };
        let (head, data) = body.split_at_checked(PAGE_RUN_BYTES).ok_or(MALFORMED)?;
        let mut words = head.chunks_exact(8).map(|w| {
            let mut word = [0; 8];
            word.copy_from_slice(w);
            u64::from_le_bytes(word)
        });
        let mut next = || words.next().ok_or(MALFORMED);
        let (kind, id, vaddr, pages, flags) = (next()?, next()?, next()?, next()?, next()?);
        let owner = match kind {
            1 => PageOwner::Task(u32::try_from(id).map_err(|_| MALFORMED)?),
            2 => PageOwner::Shared(id),
            _ => return Err(MALFORMED),
        };
        let flags = u32::try_from(flags).map_err(|_| MALFORMED)?;
        // An address space has at most 2^57 bytes.
        if pages == 0 || pages > 1 << 45 || vaddr % PAGE_BYTES as u64 != 0 {
            return Err(MALFORMED);
        }
        if vaddr.checked_add(pages * PAGE_BYTES as u64).is_none() {
            return Err(MALFORMED);
        }
        let run = Self {
            owner,
            vaddr,
            pages,
            flags,
        };
        if run.data_bytes() != data.len() as u64 {
            return Err(MALFORMED);
        }
        Ok((run, data))
    }
}

/// A piece of an image file; the pieces of one file come in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImagePiece<'a> {
    /// File name without any directory.
    pub name: &'a str,
    /// This is the file's last piece.
    pub last: bool,
    /// Its bytes.
    pub data: &'a [u8],
}

impl<'a> ImagePiece<'a> {
    /// The longest file name that is accepted.
    pub const NAME_BYTES_MAX: usize = 128;

    /// Encodes everything before the data.
    ///
    /// # Errors
    ///
    /// The name is not acceptable.
    pub fn encode_head(&self) -> Result<Vec<u8>, FrameError> {
        const MALFORMED: FrameError = FrameError::Malformed { what: "image name" };
        if !Self::acceptable(self.name) {
            return Err(MALFORMED);
        }
        let length = u8::try_from(self.name.len()).map_err(|_| MALFORMED)?;
        let mut head = vec![u8::from(self.last), length];
        head.extend_from_slice(self.name.as_bytes());
        Ok(head)
    }

    /// Decodes a body.
    ///
    /// # Errors
    ///
    /// Truncated, or a name that could leave the image directory.
    pub fn decode(body: &'a [u8]) -> Result<Self, FrameError> {
        const MALFORMED: FrameError = FrameError::Malformed {
            what: "image piece",
        };
        let [last @ (0 | 1), length, rest @ ..] = body else {
            return Err(MALFORMED);
        };
        let (name, data) = rest
            .split_at_checked(usize::from(*length))
            .ok_or(MALFORMED)?;
        let name = std::str::from_utf8(name).map_err(|_| MALFORMED)?;
        if !Self::acceptable(name) {
            return Err(MALFORMED);
        }
        Ok(Self {
            name,
            last: *last == 1,
            data,
        })
    }

    /// Only plain `*.img` names as CRIU makes them.
    fn acceptable(name: &str) -> bool {
        name.len() <= Self::NAME_BYTES_MAX
            && name.ends_with(".img")
            && !name.starts_with('.')
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::ProcessFacts;
    use proptest::prelude::*;

    #[test]
    fn memory_arrives_late_where_that_pays() {
        let much = RestoreChoice::LAZY_FROM_BYTES;
        let lazy = |choice: RestoreChoice, processes, resident_bytes, common_bytes| {
            choice.is_lazy(&TreeFacts {
                processes: vec![ProcessFacts::default(); processes],
                resident_bytes,
                common_bytes,
                ..TreeFacts::default()
            })
        };
        let auto =
            |processes, resident, common| lazy(RestoreChoice::Auto, processes, resident, common);
        assert!(auto(1, much, 0) && !auto(1, much - 1, 0));
        // Its parent is not of the tree.
        assert!(auto(1, much, much));
        assert!(auto(2, 2 * much, much / 8) && !auto(2, 2 * much, much / 8 + 1));
        assert!(!auto(3, 2 * much, 0));
        assert!(lazy(RestoreChoice::Lazy, 9, 0, 0));
        assert!(!lazy(RestoreChoice::Eager, 1, u64::MAX, 0));
    }

    #[test]
    fn header_refuses_what_it_must() {
        let good = encode_header(FrameKind::Pages, 4096).unwrap();
        assert_eq!(decode_header(good), Ok((FrameKind::Pages, 4096)));
        let mut bad = good;
        bad[4] = 9;
        assert_eq!(decode_header(bad), Err(FrameError::UnknownKind(9)));
        bad = good;
        bad[7] = 1;
        assert_eq!(decode_header(bad), Err(FrameError::Reserved));
        assert!(encode_header(FrameKind::Pages, FRAME_BODY_BYTES_MAX + 1).is_err());
        bad = good;
        bad[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(
            decode_header(bad),
            Err(FrameError::TooLarge { .. })
        ));
    }

    #[test]
    fn image_names_cannot_leave_the_directory() {
        for name in [
            "../core-1.img",
            "/etc/x.img",
            ".img",
            "a/b.img",
            "core",
            "",
            "..img",
        ] {
            let piece = ImagePiece {
                name,
                last: true,
                data: b"",
            };
            assert!(piece.encode_head().is_err(), "{name}");
            let mut body = vec![1, u8::try_from(name.len()).unwrap()];
            body.extend_from_slice(name.as_bytes());
            assert!(ImagePiece::decode(&body).is_err(), "{name}");
        }
    }

    #[test]
    fn page_run_truncated_at_every_byte_is_refused() {
        let run = PageRun {
            owner: PageOwner::Task(7),
            vaddr: 4096,
            pages: 1,
            flags: 4,
        };
        let mut body = run.encode().to_vec();
        body.extend_from_slice(&[0xab; PAGE_BYTES]);
        assert_eq!(PageRun::decode(&body).unwrap().0, run);
        for cut in 0..body.len() {
            assert!(PageRun::decode(&body[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn a_run_is_what_is_left_of_it_and_its_parts() {
        let run = |page: u64, pages: u64| PageRun {
            owner: PageOwner::Task(7),
            vaddr: page * PAGE_BYTES as u64,
            pages,
            flags: 3,
        };
        let whole = run(10, 10);
        assert_eq!(whole.without(&[]), [whole]);
        assert_eq!(whole.without(&[whole]), []);
        assert_eq!(whole.without(&[run(10, 1), run(19, 1)]), [run(11, 8)]);
        assert_eq!(
            whole.without(&[run(12, 2), run(14, 1), run(16, 3)]),
            [run(10, 2), run(15, 1), run(19, 1)]
        );
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = PageRun::decode(&body);
            let _ = ImagePiece::decode(&body);
            let _ = postcard::from_bytes::<Message>(&body);
        }

        #[test]
        fn image_pieces_round_trip(name in "[a-z]{1,20}-[0-9]{1,5}\\.img", data: Vec<u8>, last: bool) {
            let piece = ImagePiece { name: &name, last, data: &data };
            let mut body = piece.encode_head().unwrap();
            body.extend_from_slice(&data);
            prop_assert_eq!(ImagePiece::decode(&body).unwrap(), piece);
        }
    }
}
