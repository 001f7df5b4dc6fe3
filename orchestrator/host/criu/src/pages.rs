//! CRIU's page stream, read on the source while the tree is frozen.
//!
//! CRIU takes us for its page server. The stream has no greeting and no
//! version; each command is a struct in native layout, whose size changed in
//! CRIU 4.2:
//!
//! ```text
//! before 4.2 (24 bytes)           4.2 and later (32 bytes)
//!  0 u32 command | flags << 16     0 u32 command | flags << 16
//!  4 u32 pages                     4 u32 unused
//!  8 u64 address                   8 u64 pages
//! 16 u64 owner                    16 u64 address
//!                                 24 u64 owner
//! ```
//!
//! The owner is `id << 8 | type`, type 1 for a task's PID and 2 for a shared
//! segment. Per owner CRIU sends `OPEN2` (answered by one byte: is there a
//! parent image), then `ADD_F` with the pages behind it, in ascending order of
//! addresses. At the end `CLOSE` or `FORCE_CLOSE` waits for a status; anything
//! but zero makes the dump fail and the tree run on.
//!
//! Clean pages that the shim has kept from CRIU are put into that order where they belong.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::error::Error as StdError;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use migrate_core::facts::CriuVersion;
use migrate_core::wire::{PAGE_BYTES, PageOwner, PageRun};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::error::CriuError;
use crate::shim::CleanPages;

/// Most pages that are handed on in one piece: 1 MiB, well below the frame
/// limit of the channel.
pub const PIECE_PAGES_MAX: u64 = 256;

/// Least that is made room for before a read, in bytes.
const READ_BYTES: usize = 256 << 10;

/// An address space has at most 2^57 bytes, so no run has more pages.
const RUN_PAGES_MAX: u64 = 1 << 45;

/// The first release with the larger header.
const LARGE_HEADER_SINCE: CriuVersion = CriuVersion {
    major: 4,
    minor: 2,
    sublevel: 0,
};

mod command {
    pub(super) const ADD: u32 = 1;
    pub(super) const HOLE: u32 = 2;
    pub(super) const OPEN: u32 = 3;
    pub(super) const OPEN2: u32 = 4;
    pub(super) const PARENT: u32 = 5;
    pub(super) const ADD_F: u32 = 6;
    pub(super) const CLOSE: u32 = 0x1023;
    pub(super) const FORCE_CLOSE: u32 = 0x1024;
}

/// All flags that CRIU's `include/pagemap.h` has, up to 4.2. With another one the
/// pages may have a form that is not known here, as compressed ones.
const KNOWN_FLAGS: u32 = PARENT | PageRun::LAZY | PageRun::PRESENT;

/// Flag of a run whose pages are where an earlier copy is and carry no data
/// (`PE_PARENT`, CRIU's `include/pagemap.h`).
pub const PARENT: u32 = 1;

/// Our end of CRIU's page stream.
#[derive(Debug)]
pub struct PageSocket {
    pub(crate) stream: UnixStream,
    /// Tasks of which an earlier copy exists.
    pub(crate) precopied: BTreeSet<u32>,
    /// What the shim has kept from CRIU, where there is one.
    pub(crate) clean: Option<CleanPages>,
}

impl PageSocket {
    /// A stream on which somebody speaks as CRIU does. Of the `precopied` tasks
    /// an earlier copy exists.
    #[must_use]
    pub fn new(stream: UnixStream, precopied: BTreeSet<u32>) -> Self {
        Self {
            stream,
            precopied,
            clean: None,
        }
    }

    fn has(&self, owner: PageOwner) -> bool {
        match owner {
            PageOwner::Task(pid) => self.precopied.contains(&pid),
            // CRIU does not track segments: they come whole.
            PageOwner::Shared(_) => false,
        }
    }
}

/// Takes the pages of a dump.
pub trait PageSink: Send {
    /// Why pages were not taken.
    type Error: StdError + Send + Sync + 'static;

    /// Takes a run of at most [`PIECE_PAGES_MAX`] pages, or a run of any length
    /// without data: with the flag [`PARENT`], and only for tasks of which there
    /// is a copy ([`Track`](crate::Track)). An error ends the dump, and the tree
    /// runs on.
    fn pages(
        &mut self,
        run: PageRun,
        data: Bytes,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Called when everything has been handed on. An error makes the dump
    /// fail, and the tree runs on.
    fn close(&mut self, stats: PageStats) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

/// What went through the page stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageStats {
    /// Pages with data.
    pub pages: u64,
    /// Pages without data: in the parent image.
    pub pages_without_data: u64,
    /// Runs as CRIU sent them.
    pub runs: u64,
    /// Tasks and shared segments.
    pub owners: u64,
}

/// The two layouts of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// 24 bytes.
    Small,
    /// 32 bytes.
    Large,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Command {
    code: u32,
    flags: u32,
    pages: u64,
    vaddr: u64,
    owner: u64,
}

impl Layout {
    fn of(version: CriuVersion) -> Self {
        if version >= LARGE_HEADER_SINCE {
            Self::Large
        } else {
            Self::Small
        }
    }

    fn bytes(self) -> usize {
        match self {
            Self::Small => 24,
            Self::Large => 32,
        }
    }

    /// Decodes a command; the buffer holds at least [`bytes`](Self::bytes).
    fn decode(self, mut from: impl bytes::Buf) -> Command {
        let word = from.get_u32_ne();
        let small = from.get_u32_ne();
        let pages = match self {
            Self::Small => u64::from(small),
            Self::Large => from.get_u64_ne(),
        };
        Command {
            code: word & 0xffff,
            flags: word >> 16,
            pages,
            vaddr: from.get_u64_ne(),
            owner: from.get_u64_ne(),
        }
    }
}

/// The stream with what has been read ahead of it.
struct Stream {
    socket: PageSocket,
    buffer: BytesMut,
    idle: Duration,
}

impl Stream {
    /// Reads until at least `bytes` are in the buffer. `false` when the stream
    /// ended with the buffer empty.
    async fn fill(&mut self, bytes: usize, what: &'static str) -> Result<bool, CriuError> {
        while self.buffer.len() < bytes {
            let missing = bytes - self.buffer.len();
            // Reuses the memory as soon as no piece of it is held any more.
            self.buffer.reserve(missing.max(READ_BYTES));
            let read = timeout(self.idle, self.socket.stream.read_buf(&mut self.buffer))
                .await
                .map_err(|_| CriuError::PageStreamSilent { idle: self.idle })?
                .or_else(|error| match error.kind() {
                    io::ErrorKind::ConnectionReset => Ok(0),
                    _ => Err(CriuError::PageStream { source: error }),
                })?;
            if read == 0 {
                return if self.buffer.is_empty() {
                    Ok(false)
                } else {
                    Err(CriuError::PageStreamEnded { what })
                };
            }
        }
        Ok(true)
    }

    async fn take(&mut self, bytes: usize, what: &'static str) -> Result<Bytes, CriuError> {
        if self.fill(bytes, what).await? {
            Ok(self.buffer.split_to(bytes).freeze())
        } else {
            Err(CriuError::PageStreamEnded { what })
        }
    }

    async fn reply(&mut self, bytes: &[u8]) -> Result<(), CriuError> {
        timeout(self.idle, self.socket.stream.write_all(bytes))
            .await
            .map_err(|_| CriuError::PageStreamSilent { idle: self.idle })?
            .map_err(|source| CriuError::PageStream { source })
    }
}

/// Serves CRIU's page stream until its end, handing every run to `sink`.
///
/// `version` is that of the CRIU at the other end and decides the layout.
/// `idle` bounds every single wait, the one for the freeze included.
///
/// Whatever fails, the dump fails with it and the tree runs on: before the end
/// because the stream breaks, at the end because the status is not zero.
///
/// # Errors
///
/// The stream ends early, stands still or does not follow the protocol; or the
/// sink refused.
pub async fn serve_pages<S: PageSink>(
    socket: PageSocket,
    version: CriuVersion,
    sink: &mut S,
    idle: Duration,
) -> Result<PageStats, CriuError> {
    let layout = Layout::of(version);
    let mut stream = Stream {
        socket,
        buffer: BytesMut::with_capacity(READ_BYTES),
        idle,
    };
    let mut stats = PageStats::default();
    let mut kept = KeptBack::new(stream.socket.clean.take());
    loop {
        if !stream.fill(layout.bytes(), "a whole command").await? {
            return Err(CriuError::PageStreamEnded {
                what: "the closing command",
            });
        }
        let command = layout.decode(stream.buffer.split_to(layout.bytes()));
        check_flags(&command)?;
        match command.code {
            command::OPEN2 | command::OPEN => {
                kept.open(owner(command.owner)?, sink, &mut stats).await?;
            }
            command::ADD_F | command::ADD | command::HOLE => {
                let below = (owner(command.owner)?, command.vaddr);
                kept.list_below(below, sink, &mut stats).await?;
            }
            command::CLOSE | command::FORCE_CLOSE => kept.close(sink, &mut stats).await?,
            _ => {}
        }
        match command.code {
            command::OPEN2 => {
                let known = stream.socket.has(owner(command.owner)?);
                stats.owners += 1;
                // Without a parent every page is sent with its data.
                stream.reply(&[u8::from(known)]).await?;
            }
            command::OPEN => {
                owner(command.owner)?;
                stats.owners += 1;
            }
            command::PARENT => {
                let known = stream.socket.has(owner(command.owner)?);
                stream.reply(&i32::from(known).to_ne_bytes()).await?;
            }
            command::ADD_F => run(&mut stream, sink, &mut stats, command, command.flags).await?,
            command::ADD => {
                run(&mut stream, sink, &mut stats, command, PageRun::PRESENT).await?;
            }
            command::HOLE => run(&mut stream, sink, &mut stats, command, PARENT).await?,
            command::CLOSE | command::FORCE_CLOSE => {
                let closed = sink.close(stats).await;
                let status = i32::from(closed.is_err());
                stream.reply(&status.to_ne_bytes()).await?;
                closed.map_err(refused)?;
                return Ok(stats);
            }
            other => {
                return Err(CriuError::PageProtocol {
                    what: "command",
                    value: u64::from(other),
                });
            }
        }
    }
}

/// Clean pages that the shim has kept from CRIU, until their place in the list has come.
struct KeptBack {
    source: Option<CleanPages>,
    /// Whose pages CRIU lists.
    current: Option<PageOwner>,
    tasks: BTreeMap<u32, VecDeque<Range<u64>>>,
}

impl KeptBack {
    const fn new(source: Option<CleanPages>) -> Self {
        Self {
            source,
            current: None,
            tasks: BTreeMap::new(),
        }
    }

    fn refresh(&mut self) -> Result<(), CriuError> {
        let Some(source) = &mut self.source else {
            return Ok(());
        };
        let new = source
            .next()
            .map_err(|source| CriuError::PageStream { source })?;
        for (pid, range) in new {
            self.tasks.entry(pid).or_default().push_back(range);
        }
        Ok(())
    }

    /// Lists what is below a run that CRIU has sent.
    async fn list_below<S: PageSink>(
        &mut self,
        (owner, vaddr): (PageOwner, u64),
        sink: &mut S,
        stats: &mut PageStats,
    ) -> Result<(), CriuError> {
        self.refresh()?;
        let PageOwner::Task(pid) = owner else {
            return Ok(());
        };
        let Some(ranges) = self.tasks.get_mut(&pid) else {
            return Ok(());
        };
        while let Some(range) = ranges.pop_front_if(|range| range.start < vaddr) {
            if range.end > vaddr {
                return Err(CriuError::PageProtocol {
                    what: "address of pages that are clean",
                    value: vaddr,
                });
            }
            list(pid, range, sink, stats).await?;
        }
        Ok(())
    }

    /// Lists what is left of the owner that CRIU has done with, since it comes to the next one.
    async fn open<S: PageSink>(
        &mut self,
        owner: PageOwner,
        sink: &mut S,
        stats: &mut PageStats,
    ) -> Result<(), CriuError> {
        self.refresh()?;
        if let Some(PageOwner::Task(pid)) = self.current.replace(owner) {
            for range in self.tasks.remove(&pid).unwrap_or_default() {
                list(pid, range, sink, stats).await?;
            }
        }
        Ok(())
    }

    /// Lists what is left.
    async fn close<S: PageSink>(
        &mut self,
        sink: &mut S,
        stats: &mut PageStats,
    ) -> Result<(), CriuError> {
        self.refresh()?;
        for (pid, ranges) in std::mem::take(&mut self.tasks) {
            for range in ranges {
                list(pid, range, sink, stats).await?;
            }
        }
        Ok(())
    }
}

/// Hands on pages that are where the earlier copy is.
async fn list<S: PageSink>(
    pid: u32,
    range: Range<u64>,
    sink: &mut S,
    stats: &mut PageStats,
) -> Result<(), CriuError> {
    let run = PageRun {
        owner: PageOwner::Task(pid),
        vaddr: range.start,
        pages: range.end.saturating_sub(range.start) / PAGE_BYTES as u64,
        flags: PARENT,
    };
    stats.runs += 1;
    stats.pages_without_data += run.pages;
    sink.pages(run, Bytes::new()).await.map_err(refused)
}

fn refused(source: impl StdError + Send + Sync + 'static) -> CriuError {
    CriuError::Sink {
        source: Box::new(source),
    }
}

/// Whether a command has no flags but what CRIU gives it, of which [`ADD_F`](command::ADD_F)
/// alone has any: pages are behind it, or where the earlier copy is. Pages that are neither
/// would be nowhere; only a dump that nobody orders leaves them for later.
fn check_flags(command: &Command) -> Result<(), CriuError> {
    let flags = command.flags;
    let known = match command.code {
        command::ADD_F => {
            flags & !KNOWN_FLAGS == 0 && (flags & PARENT == 0) != (flags & PageRun::PRESENT == 0)
        }
        _ => flags == 0,
    };
    if known {
        Ok(())
    } else {
        Err(CriuError::PageProtocol {
            what: "flags",
            value: u64::from(flags),
        })
    }
}

/// Hands one run on, in pieces.
async fn run<S: PageSink>(
    stream: &mut Stream,
    sink: &mut S,
    stats: &mut PageStats,
    command: Command,
    flags: u32,
) -> Result<(), CriuError> {
    let Command { pages, vaddr, .. } = command;
    let protocol = |what, value| CriuError::PageProtocol { what, value };
    let owner = owner(command.owner)?;
    if pages == 0 || pages > RUN_PAGES_MAX {
        return Err(protocol("number of pages", pages));
    }
    let bytes = pages * PAGE_BYTES as u64;
    if !vaddr.is_multiple_of(PAGE_BYTES as u64) || vaddr.checked_add(bytes).is_none() {
        return Err(protocol("address", vaddr));
    }
    if flags & PARENT != 0 && !stream.socket.has(owner) {
        // Nobody has these pages.
        return Err(protocol("flags", u64::from(flags)));
    }
    stats.runs += 1;
    let mut left = PageRun {
        owner,
        vaddr,
        pages,
        flags,
    };
    if left.data_bytes() == 0 {
        stats.pages_without_data += pages;
        return sink.pages(left, Bytes::new()).await.map_err(refused);
    }
    while left.pages > 0 {
        let piece = PageRun {
            pages: left.pages.min(PIECE_PAGES_MAX),
            ..left
        };
        let length = usize::try_from(piece.data_bytes())
            .map_err(|_| protocol("number of pages", piece.pages))?;
        let data = stream.take(length, "the pages of a run").await?;
        sink.pages(piece, data).await.map_err(refused)?;
        stats.pages += piece.pages;
        left.pages -= piece.pages;
        left.vaddr += piece.data_bytes();
    }
    Ok(())
}

fn owner(id: u64) -> Result<PageOwner, CriuError> {
    let unknown = CriuError::PageProtocol {
        what: "owner of pages",
        value: id,
    };
    match (id & 0xff, id >> 8) {
        (1, pid) => u32::try_from(pid).map(PageOwner::Task).map_err(|_| unknown),
        (2, segment) => Ok(PageOwner::Shared(segment)),
        _ => Err(unknown),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OLD: CriuVersion = CriuVersion {
        major: 4,
        minor: 1,
        sublevel: 1,
    };
    const NEW: CriuVersion = CriuVersion {
        major: 4,
        minor: 2,
        sublevel: 1,
    };
    const IDLE: Duration = Duration::from_secs(10);
    const PID_7: u64 = 7 << 8 | 1;

    /// Of task 7 there is a copy.
    fn socket(stream: UnixStream) -> PageSocket {
        PageSocket::new(stream, [7].into())
    }

    /// Keeps everything; refuses where told to.
    #[derive(Default)]
    struct Kept {
        runs: Vec<(PageRun, Bytes)>,
        refuse_close: bool,
        refuse_pages: bool,
        closed: bool,
    }

    impl PageSink for Kept {
        type Error = io::Error;

        async fn pages(&mut self, run: PageRun, data: Bytes) -> io::Result<()> {
            if self.refuse_pages {
                return Err(io::Error::other("no"));
            }
            self.runs.push((run, data));
            Ok(())
        }

        async fn close(&mut self, _: PageStats) -> io::Result<()> {
            self.closed = true;
            if self.refuse_close {
                return Err(io::Error::other("no"));
            }
            Ok(())
        }
    }

    /// A command as CRIU of that version lays it out in memory.
    fn encode(
        version: CriuVersion,
        code: u32,
        flags: u32,
        pages: u64,
        vaddr: u64,
        id: u64,
    ) -> Vec<u8> {
        let mut out = (code | flags << 16).to_ne_bytes().to_vec();
        if version == OLD {
            out.extend(u32::try_from(pages).unwrap().to_ne_bytes());
        } else {
            // CRIU does not clear the padding.
            out.extend([0xee; 4]);
            out.extend(pages.to_ne_bytes());
        }
        out.extend(vaddr.to_ne_bytes());
        out.extend(id.to_ne_bytes());
        out
    }

    /// Plays CRIU: sends each step, then expects that many bytes of answer.
    async fn play(
        version: CriuVersion,
        sink: &mut Kept,
        script: Vec<(Vec<u8>, usize)>,
    ) -> (Result<PageStats, CriuError>, Vec<u8>) {
        play_with(version, sink, script, None).await
    }

    /// The same, with what the shim has kept back.
    async fn play_with(
        version: CriuVersion,
        sink: &mut Kept,
        script: Vec<(Vec<u8>, usize)>,
        clean: Option<CleanPages>,
    ) -> (Result<PageStats, CriuError>, Vec<u8>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let peer = async move {
            let mut answers = Vec::new();
            for (bytes, answer) in script {
                if theirs.write_all(&bytes).await.is_err() {
                    break;
                }
                let mut reply = vec![0; answer];
                if theirs.read_exact(&mut reply).await.is_err() {
                    break;
                }
                answers.extend(reply);
            }
            drop(theirs);
            answers
        };
        let socket = PageSocket {
            clean,
            ..socket(ours)
        };
        tokio::join!(serve_pages(socket, version, sink, IDLE), peer)
    }

    #[tokio::test]
    async fn a_session_in_both_layouts() {
        for version in [OLD, NEW] {
            let segment = 9 << 8 | 2;
            let data: Vec<u8> = (0..=250).cycle().take(600 * PAGE_BYTES).collect();
            let mut add = encode(version, 6, 4, 600, 0x1000, PID_7);
            add.extend(&data);
            let mut sink = Kept::default();
            let (stats, answers) = play(
                version,
                &mut sink,
                vec![
                    (encode(version, 5, 0, 0, 0, PID_7), 4),
                    (encode(version, 4, 0, 0, 0, PID_7), 1),
                    (add, 0),
                    (encode(version, 6, 1, 3, 0x80_0000, PID_7), 0),
                    (encode(version, 2, 0, 1, 0x90_0000, PID_7), 0),
                    (encode(version, 4, 0, 0, 0, segment), 1),
                    (
                        [encode(version, 1, 0, 1, 0, segment), vec![9; PAGE_BYTES]].concat(),
                        0,
                    ),
                    (encode(version, 0x1024, 0, 0, 0, 0), 4),
                ],
            )
            .await;
            assert_eq!(
                stats.unwrap(),
                PageStats {
                    pages: 601,
                    pages_without_data: 4,
                    runs: 4,
                    owners: 2
                }
            );
            let known = 1i32.to_ne_bytes().to_vec();
            assert_eq!(answers, [known, vec![1, 0], vec![0; 4]].concat());
            assert!(sink.closed);
            let pieces: Vec<(u64, u64)> = sink
                .runs
                .iter()
                .map(|(run, _)| (run.vaddr, run.pages))
                .collect();
            assert_eq!(
                pieces,
                [
                    (0x1000, 256),
                    (0x10_1000, 256),
                    (0x20_1000, 88),
                    (0x80_0000, 3),
                    (0x90_0000, 1),
                    (0, 1)
                ]
            );
            let received: Vec<u8> = sink.runs[..3]
                .iter()
                .flat_map(|(_, data)| data.to_vec())
                .collect();
            assert!(received == data);
            assert_eq!(sink.runs[5].0.owner, PageOwner::Shared(9));
        }
    }

    #[tokio::test]
    async fn what_was_kept_from_criu_is_listed_in_its_place() {
        const PID_8: u64 = 8 << 8 | 1;
        const P: u64 = PAGE_BYTES as u64;
        let page = |id, at: u64| {
            let data = vec![1; PAGE_BYTES];
            [encode(NEW, 6, 4, 1, at * P, id), data].concat()
        };
        let kept = [(7, 1..3), (8, 5..6), (7, 4..6), (7, 8..9), (8, 9..10)];
        let kept = kept.map(|(pid, pages)| (pid, pages.start * P..pages.end * P));
        let mut sink = Kept::default();
        let script = vec![
            (encode(NEW, 4, 0, 0, 0, PID_7), 1),
            (page(PID_7, 3), 0),
            (page(PID_7, 6), 0),
            (encode(NEW, 4, 0, 0, 0, PID_8), 1),
            (page(PID_8, 7), 0),
            (encode(NEW, 4, 0, 0, 0, 9 << 8 | 2), 1),
            (encode(NEW, 0x1024, 0, 0, 0, 0), 4),
        ];
        let clean = CleanPages::holding(&kept);
        let (stats, _) = play_with(NEW, &mut sink, script, Some(clean)).await;
        let stats = stats.unwrap();
        assert_eq!((stats.pages, stats.pages_without_data), (3, 7));
        let of = |pid| {
            let runs = sink
                .runs
                .iter()
                .filter(move |(run, _)| run.owner == PageOwner::Task(pid));
            runs.map(|(run, data)| (run.vaddr / P, run.pages, run.flags, data.is_empty()))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            of(7),
            [
                (1, 2, PARENT, true),
                (3, 1, PageRun::PRESENT, false),
                (4, 2, PARENT, true),
                (6, 1, PageRun::PRESENT, false),
                (8, 1, PARENT, true)
            ]
        );
        assert_eq!(
            of(8),
            [
                (5, 1, PARENT, true),
                (7, 1, PageRun::PRESENT, false),
                (9, 1, PARENT, true)
            ]
        );

        // What CRIU lists itself cannot be kept from it.
        let mut sink = Kept::default();
        let script = vec![(page(PID_7, 2), 0)];
        let clean = CleanPages::holding(&[(7, P..3 * P)]);
        let (refused, _) = play_with(NEW, &mut sink, script, Some(clean)).await;
        assert!(matches!(refused, Err(CriuError::PageProtocol { .. })));
        assert!(sink.runs.is_empty());
    }

    #[tokio::test]
    async fn a_sink_that_cannot_close_vetoes_the_dump() {
        let mut sink = Kept {
            refuse_close: true,
            ..Kept::default()
        };
        let (result, answers) =
            play(NEW, &mut sink, vec![(encode(NEW, 0x1024, 0, 0, 0, 0), 4)]).await;
        assert!(matches!(result, Err(CriuError::Sink { .. })));
        assert_ne!(i32::from_ne_bytes(answers.try_into().unwrap()), 0);
    }

    #[tokio::test]
    async fn a_sink_that_refuses_pages_breaks_the_stream() {
        let mut sink = Kept {
            refuse_pages: true,
            ..Kept::default()
        };
        let mut add = encode(NEW, 6, 4, 4000, 0x1000, PID_7);
        add.resize(add.len() + 4000 * PAGE_BYTES, 1);
        let (result, answers) = play(
            NEW,
            &mut sink,
            vec![(add, 0), (encode(NEW, 0x1024, 0, 0, 0, 0), 4)],
        )
        .await;
        assert!(matches!(result, Err(CriuError::Sink { .. })));
        assert!(answers.is_empty() && !sink.closed);
    }

    #[tokio::test]
    async fn every_truncation_is_an_error_and_never_closes() {
        let mut bytes = encode(NEW, 6, 4, 1, 0x1000, PID_7);
        bytes.resize(bytes.len() + PAGE_BYTES, 1);
        for cut in [0, 1, 31, 32, 33, bytes.len() - 1, bytes.len()] {
            let mut sink = Kept::default();
            let (result, _) = play(NEW, &mut sink, vec![(bytes[..cut].to_vec(), 0)]).await;
            assert!(
                matches!(result, Err(CriuError::PageStreamEnded { .. })),
                "{cut}: {result:?}"
            );
            assert!(!sink.closed);
        }
    }

    #[tokio::test]
    async fn what_no_criu_sends_is_refused() {
        for bad in [
            encode(NEW, 99, 0, 1, 0x1000, PID_7),
            encode(NEW, 6, 4, 0, 0x1000, PID_7),
            encode(NEW, 6, 4, u64::MAX, 0x1000, PID_7),
            encode(NEW, 6, 4, 1, 0x1001, PID_7),
            encode(NEW, 6, 1, 1 << 44, !0xfff, PID_7),
            encode(NEW, 6, 4, 1, 0x1000, 7 << 8 | 3),
            encode(NEW, 4, 0, 0, 0, u64::MAX << 8 | 1),
            // Left out, though there is no copy; left out and sent.
            encode(NEW, 6, 1, 1, 0x1000, 8 << 8 | 1),
            encode(NEW, 2, 0, 1, 0x1000, 7 << 8 | 2),
            encode(NEW, 6, 5, 1, 0x1000, PID_7),
            // Neither left out nor sent; left for later.
            encode(NEW, 6, 0, 1, 0x1000, PID_7),
            encode(NEW, 6, 2, 1, 0x1000, PID_7),
            // Flags that no CRIU has, and such as this command has not.
            encode(NEW, 6, 4 | 1 << 3, 1, 0x1000, PID_7),
            encode(NEW, 6, 1 | 1 << 3, 1, 0x1000, PID_7),
            encode(NEW, 6, 4 | 1 << 15, 1, 0x1000, PID_7),
            encode(NEW, 4, 4, 0, 0, PID_7),
            encode(NEW, 1, 4, 1, 0x1000, PID_7),
            encode(NEW, 0x1024, 1, 0, 0, 0),
            // The other layout.
            encode(OLD, 6, 4, 1, 0x1000, PID_7)
                .into_iter()
                .chain([0; 8])
                .collect(),
        ] {
            let (result, _) = play(NEW, &mut Kept::default(), vec![(bad, 0)]).await;
            assert!(
                matches!(result, Err(CriuError::PageProtocol { .. })),
                "{result:?}"
            );
        }
    }

    #[tokio::test]
    async fn silence_has_a_limit() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let result = serve_pages(
            socket(ours),
            NEW,
            &mut Kept::default(),
            Duration::from_millis(20),
        )
        .await;
        assert!(matches!(result, Err(CriuError::PageStreamSilent { .. })));
    }

    proptest! {
        #[test]
        fn commands_round_trip(code in 0u32..0x10000, flags in 0u32..0x10000, pages: u32, vaddr: u64, id: u64) {
            for version in [OLD, NEW] {
                let bytes = encode(version, code, flags, u64::from(pages), vaddr, id);
                let layout = Layout::of(version);
                prop_assert_eq!(bytes.len(), layout.bytes());
                prop_assert_eq!(
                    layout.decode(&bytes[..]),
                    Command { code, flags, pages: u64::from(pages), vaddr, owner: id }
                );
            }
        }

        #[test]
        fn any_bytes_are_served_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (result, _) = runtime.block_on(play(NEW, &mut Kept::default(), vec![(bytes, 0)]));
            prop_assert!(result.is_err());
        }
    }
}
