//! Image directories: what the source sends, and what the destination builds.
//!
//! On the source CRIU writes everything but memory into a directory. On the
//! destination those files are written down as they come, and the page stream
//! becomes the memory images of a full dump without parents, so that CRIU
//! reads the pages straight into their final place.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use migrate_core::policy::Credentials;
use migrate_core::wire::{ImagePiece, PAGE_BYTES, PageOwner, PageRun};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use prost::Message;

use crate::error::CriuError;
use crate::pages::PARENT;

/// `IMG_COMMON_MAGIC` of CRIU's `include/magic.h`: starts every image.
const COMMON_MAGIC: u32 = 0x5456_4319;
/// `PAGEMAP_MAGIC`, for tasks and shared segments alike.
const PAGEMAP_MAGIC: u32 = 0x5608_4025;

/// `INVENTORY_MAGIC`, which alone stands at the start of an inventory.
const INVENTORY_MAGIC: u32 = 0x5831_3116;

/// `MM_MAGIC`, for the mappings of a task.
const MM_MAGIC: u32 = 0x5749_2820;

/// `CORE_MAGIC`, for a task or thread.
const CORE_MAGIC: u32 = 0x5505_3847;

/// The page may come after the restore.
const LAZY: u32 = PageRun::LAZY;

/// Tasks and segments whose memory is accepted.
const OWNERS_MAX: usize = 1 << 16;
/// Image files that are accepted: about six per task and one per connection.
const IMAGES_MAX: usize = 1 << 18;

#[derive(Clone, PartialEq, Message)]
struct PagemapHead {
    #[prost(uint32, required, tag = "1")]
    pages_id: u32,
}

#[derive(Clone, PartialEq, Message)]
struct PagemapEntry {
    #[prost(uint64, required, tag = "1")]
    vaddr: u64,
    /// The count for CRIU before 4.2, which ignores `nr_pages`.
    #[prost(uint32, required, tag = "2")]
    compat_nr_pages: u32,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    /// The count for CRIU 4.2 and later.
    #[prost(uint64, optional, tag = "5")]
    nr_pages: Option<u64>,
}

/// The mappings of a task.
#[derive(Clone, PartialEq, Message)]
struct MmEntry {
    #[prost(message, repeated, tag = "14")]
    vmas: Vec<VmaEntry>,
}

#[derive(Clone, PartialEq, Message)]
struct VmaEntry {
    #[prost(uint64, required, tag = "1")]
    start: u64,
    #[prost(uint64, required, tag = "2")]
    end: u64,
    /// As for `mmap`.
    #[prost(uint32, required, tag = "6")]
    flags: u32,
    /// `VMA_AREA_*` and `VMA_*` of CRIU's `include/image.h`.
    #[prost(uint32, required, tag = "7")]
    status: u32,
    /// Set of `MADV_*`.
    #[prost(uint64, optional, tag = "9")]
    advice: Option<u64>,
}

impl VmaEntry {
    const REGULAR: u32 = 1 << 0;
    const ANON_PRIVATE: u32 = 1 << 9;
    /// No mapping, but pages within one that nobody may touch.
    const GUARD: u32 = 1 << 16;
    /// Main stack, vsyscall, vdso, vvar, AIO ring, shadow stack. A stack could
    /// be lazy, but is small and needed at once.
    const SPECIAL: u32 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 12 | 1 << 13 | 1 << 15;

    /// Whether it is made of whole pages, as everything that is done with it
    /// supposes. An image may say anything.
    fn is_sound(&self) -> bool {
        let page = PAGE_BYTES as u64;
        self.start < self.end && self.start.is_multiple_of(page) && self.end.is_multiple_of(page)
    }

    /// Whether CRIU watches it for missing pages in a lazy restore.
    fn can_be_lazy(&self) -> bool {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let not = libc::MAP_LOCKED | libc::MAP_HUGETLB;
        let wanted = Self::REGULAR | Self::ANON_PRIVATE;
        self.flags.cast_signed() & (flags | not) == flags
            && self.status & (wanted | Self::SPECIAL) == wanted
    }

    /// Whether children find zeros there. They do not say so when the copy
    /// forks, and would get what their parent lacks: it must lack nothing.
    fn is_wiped_on_fork(&self) -> bool {
        self.advice
            .is_some_and(|advice| advice & 1 << libc::MADV_WIPEONFORK != 0)
    }

    /// CRIU maps locked memory as such, and Linux then provides all of its pages
    /// at once. A process that is forked off before these are filled inherits
    /// them, and CRIU takes back only those that the parent's image names
    /// (`restore_priv_vma_content` in `criu/mem.c` of 4.2): the child would keep
    /// pages of zeros where its own are to come.
    fn is_locked(&self) -> bool {
        self.flags.cast_signed() & libc::MAP_LOCKED != 0
    }

    fn meets(&self, ranges: &[Range<u64>]) -> bool {
        ranges
            .iter()
            .any(|range| range.start < self.end && self.start < range.end)
    }
}

/// A task or thread; what is read of it.
#[derive(Clone, PartialEq, Message)]
struct CoreEntry {
    #[prost(message, optional, tag = "3")]
    task: Option<TaskEntry>,
    #[prost(message, optional, tag = "5")]
    thread: Option<ThreadEntry>,
}

#[derive(Clone, PartialEq, Message)]
struct TaskEntry {
    #[prost(uint32, required, tag = "1")]
    state: u32,
}

impl TaskEntry {
    /// `TASK_DEAD` of CRIU's `include/crtools.h`: it has ended and was not
    /// reaped, and ends again as soon as it is restored.
    const DEAD: u32 = 2;
}

#[derive(Clone, PartialEq, Message)]
struct ThreadEntry {
    #[prost(message, optional, tag = "10")]
    creds: Option<CredsEntry>,
}

#[derive(Clone, PartialEq, Message)]
struct CredsEntry {
    #[prost(uint32, required, tag = "1")]
    uid: u32,
    #[prost(uint32, required, tag = "3")]
    euid: u32,
    #[prost(uint32, required, tag = "5")]
    suid: u32,
    #[prost(uint32, required, tag = "7")]
    fsuid: u32,
    #[prost(uint32, repeated, packed = "false", tag = "9")]
    inheritable: Vec<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "10")]
    permitted: Vec<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "11")]
    effective: Vec<u32>,
}

/// The two fields that CRIU reads of the inventory of an earlier dump.
#[derive(Clone, PartialEq, Message)]
struct Inventory {
    #[prost(uint32, required, tag = "1")]
    img_version: u32,
    /// When that was, as `/proc/uptime` has it, in microseconds.
    #[prost(uint64, optional, tag = "8")]
    dump_uptime: Option<u64>,
}

/// The inventory of an earlier dump that says no more than when it was.
pub(crate) fn uptime_inventory(uptime_us: u64) -> Vec<u8> {
    let mut out = INVENTORY_MAGIC.to_le_bytes().to_vec();
    record(
        &mut out,
        &Inventory {
            // As in the inventory of CRIU's own pre-dump.
            img_version: 0,
            dump_uptime: Some(uptime_us),
        },
    );
    out
}

/// Has the pages that the dump has left out.
pub trait Filler {
    /// Writes `pages` pages of `owner` from `vaddr` on to `out`, in order.
    ///
    /// # Errors
    ///
    /// One of them is not there: what has been written by then stands before
    /// it. Or `out` took no more, whose error must be passed on.
    fn fill(
        &mut self,
        owner: PageOwner,
        vaddr: u64,
        pages: u64,
        out: &mut dyn io::Write,
    ) -> io::Result<()>;
}

impl<F> Filler for F
where
    F: FnMut(PageOwner, u64, u64, &mut dyn io::Write) -> io::Result<()>,
{
    fn fill(
        &mut self,
        owner: PageOwner,
        vaddr: u64,
        pages: u64,
        out: &mut dyn io::Write,
    ) -> io::Result<()> {
        self(owner, vaddr, pages, out)
    }
}

/// The image that CRIU opens first.
pub(crate) const INVENTORY: &str = "inventory.img";

/// An image file that the source has to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SmallImage {
    /// Name without directory, acceptable to [`ImagePiece`].
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Its size, in bytes.
    pub bytes: u64,
}

/// The images in `directory` that carry no memory, sorted by name.
///
/// # Errors
///
/// The directory cannot be read, or holds an image with a name that cannot be
/// sent.
pub fn small_images(directory: &Path) -> Result<Vec<SmallImage>, CriuError> {
    let listing = |source| CriuError::image("list", directory, source);
    let mut images = Vec::new();
    for entry in fs::read_dir(directory).map_err(listing)? {
        let entry = entry.map_err(listing)?;
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "img") {
            continue;
        }
        let metadata = entry
            .metadata()
            .map_err(|source| CriuError::image("examine", &path, source))?;
        // An inventory that CRIU still waits for is a FIFO.
        if !metadata.is_file() {
            continue;
        }
        let name = entry.file_name();
        let name =
            name.to_str()
                .filter(|name| sendable(name))
                .ok_or_else(|| CriuError::ImageData {
                    what: format!("file name {}", path.display()),
                })?;
        if !metadata.is_file() || carries_memory(name) {
            continue;
        }
        images.push(SmallImage {
            name: name.to_owned(),
            path,
            bytes: metadata.len(),
        });
    }
    images.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(images)
}

fn sendable(name: &str) -> bool {
    let piece = ImagePiece {
        name,
        last: true,
        data: &[],
    };
    piece.encode_head().is_ok()
}

/// Names that [`ImageDir`] writes itself.
fn carries_memory(name: &str) -> bool {
    name.starts_with("pages-") || name.starts_with("pagemap-")
}

/// Where the pages of a run are, in a directory that [`ImageDir`] has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRun {
    /// The pages.
    pub run: PageRun,
    /// The file with their content.
    pub path: PathBuf,
    /// Where in it, in bytes.
    pub at_bytes: u64,
}

/// The memory in a finished directory of an [`ImageDir`] that leaves nothing
/// out, owner by owner in ascending order of addresses.
///
/// # Errors
///
/// The directory cannot be read, or a page map in it is malformed.
pub fn stored_runs(directory: &Path) -> Result<Vec<StoredRun>, CriuError> {
    let listing = |source| CriuError::image("list", directory, source);
    let mut maps = BTreeMap::new();
    for entry in fs::read_dir(directory).map_err(listing)? {
        let path = entry.map_err(listing)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        if let Some(owner) = name.and_then(owner_of_map) {
            maps.insert(owner, path);
        }
    }
    let mut stored = Vec::new();
    for (owner, path) in maps {
        let (pages_id, runs) = read_image(&path, decode_pagemap)?;
        let pages = directory.join(pages_name(pages_id));
        let mut at_bytes = 0_u64;
        for run in runs {
            let run = PageRun {
                owner,
                vaddr: run.vaddr,
                pages: run.pages,
                flags: run.flags,
            };
            stored.push(StoredRun {
                run,
                path: pages.clone(),
                at_bytes,
            });
            at_bytes = at_bytes.saturating_add(run.pages.saturating_mul(PAGE_BYTES as u64));
        }
    }
    Ok(stored)
}

fn owner_of_map(name: &str) -> Option<PageOwner> {
    let owner = name.strip_prefix("pagemap-")?.strip_suffix(".img")?;
    match owner.strip_prefix("shmem-") {
        Some(id) => id.parse().ok().map(PageOwner::Shared),
        None => owner.parse().ok().map(PageOwner::Task),
    }
}

/// Whether pages of a map are what CRIU 4.2 knows and have content, which is where those
/// before them end.
fn has_content(flags: u32) -> bool {
    flags & !LAZY == PageRun::PRESENT
}

/// Reads a page map: the number of its file, and its runs.
fn decode_pagemap(image: &[u8]) -> Option<(u32, Vec<Run>)> {
    let mut rest = image;
    let mut word = || {
        let (word, after) = rest.split_first_chunk::<4>()?;
        rest = after;
        Some(u32::from_le_bytes(*word))
    };
    if word()? != COMMON_MAGIC || word()? != PAGEMAP_MAGIC {
        return None;
    }
    let mut record = || {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
        let (record, after) = after.split_at_checked(length)?;
        rest = after;
        Some((record, after.is_empty()))
    };
    let (head, mut last) = record()?;
    let head = PagemapHead::decode(head).ok()?;
    let mut runs = Vec::new();
    while !last {
        let (entry, end) = record()?;
        last = end;
        let entry = PagemapEntry::decode(entry).ok()?;
        runs.push(Run {
            vaddr: entry.vaddr,
            pages: entry.nr_pages?,
            flags: entry.flags.filter(|&flags| has_content(flags))?,
        });
    }
    Some((head.pages_id, runs))
}

/// What an [`ImageDir`] holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ImageStats {
    /// Pages with data.
    pub pages: u64,
    /// Pages that came without, as gaps.
    pub pages_in_gaps: u64,
    /// Pages of either kind that are left for later.
    pub lazy_pages: u64,
    /// Image files that came whole, without those for memory.
    pub images: u32,
    /// Bytes in them.
    pub image_bytes: u64,
}

/// An image directory in the making. It is removed when dropped: images hold
/// the memory of a process.
#[derive(Debug)]
pub struct ImageDir {
    path: PathBuf,
    owners: BTreeMap<PageOwner, Memory>,
    /// CRIU sends one owner's pages after the other's.
    open_pages: Option<(PageOwner, File)>,
    open_images: BTreeMap<String, File>,
    whole_images: BTreeSet<String>,
    stats: ImageStats,
    /// Pages that can wait are left out.
    lazy: bool,
    /// The name that the inventory gets until CRIU may have it.
    inventory_name: &'static str,
    finished: bool,
}

/// The pages of one owner.
#[derive(Debug)]
struct Memory {
    pages_id: u32,
    runs: Vec<Run>,
    /// Pages in the file, gaps included.
    pages: u64,
    gaps: Vec<Gap>,
    /// Mappings of which all can wait.
    waiting: Vec<Range<u64>>,
}

/// Pages whose content is still to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Gap {
    /// Where they are in the file, counted in pages.
    at: u64,
    vaddr: u64,
    pages: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    vaddr: u64,
    pages: u64,
    flags: u32,
}

impl Run {
    fn end(self) -> u64 {
        self.vaddr + self.pages * PAGE_BYTES as u64
    }
}

impl ImageDir {
    /// Makes the directory, mode 0700.
    ///
    /// # Errors
    ///
    /// It exists, cannot be made, or is not on a tmpfs.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, CriuError> {
        let this = Self::create_on_disk(path)?;
        let kind = statfs(&this.path)
            .map_err(|errno| CriuError::image("examine", &this.path, errno.into()))?;
        if kind.filesystem_type() != TMPFS_MAGIC {
            // Dropping it removes the directory.
            return Err(CriuError::NotTmpfs {
                path: this.path.clone(),
            });
        }
        Ok(this)
    }

    /// The same wherever the user has asked for it, on a disk as a rule: the
    /// images have to outlive the machine's memory.
    ///
    /// # Errors
    ///
    /// It exists or cannot be made.
    pub fn create_on_disk(path: impl Into<PathBuf>) -> Result<Self, CriuError> {
        let path = path.into();
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|source| CriuError::image("create", &path, source))?;
        Ok(Self {
            path,
            owners: BTreeMap::new(),
            open_pages: None,
            open_images: BTreeMap::new(),
            whole_images: BTreeSet::new(),
            stats: ImageStats::default(),
            lazy: false,
            inventory_name: INVENTORY,
            finished: false,
        })
    }

    /// Puts the inventory elsewhere when it comes.
    pub(crate) fn hold_inventory(&mut self, name: &'static str) -> Result<(), CriuError> {
        if self.whole_images.contains(INVENTORY) || self.open_images.contains_key(INVENTORY) {
            return Err(CriuError::ImageData {
                what: format!("{INVENTORY} has come before CRIU was to wait for it"),
            });
        }
        self.inventory_name = name;
        Ok(())
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What has come up to now.
    #[must_use]
    pub fn stats(&self) -> ImageStats {
        self.stats
    }

    /// Leaves out the content of all pages that can be put in place while the
    /// copy already runs, so that only a restore with
    /// [`RestoreOptions::lazy`](crate::RestoreOptions::lazy) can use the
    /// directory. To be called before the first page comes.
    ///
    /// Those pages are in [`lazy_ranges`](Self::lazy_ranges) once everything
    /// has come. What comes with data must be kept by the caller, see
    /// [`leaves_out`](Self::leaves_out); what comes without is not asked for by
    /// [`fill`](Self::fill).
    ///
    /// # Errors
    ///
    /// Pages have come.
    pub fn lazy(&mut self) -> Result<(), CriuError> {
        self.still_open()?;
        if !self.owners.is_empty() {
            return Err(CriuError::ImageData {
                what: "pages came before it was said that some can wait".to_owned(),
            });
        }
        self.lazy = true;
        Ok(())
    }

    /// Whether [`pages`](Self::pages) would note this run and not keep its
    /// data.
    #[must_use]
    pub fn leaves_out(&self, run: &PageRun) -> bool {
        self.lazy && run.flags & LAZY != 0 && matches!(run.owner, PageOwner::Task(_))
    }

    /// The pages that somebody has to put in place after the restore, in order.
    /// Complete once the directory is [finished](Self::finish).
    #[must_use]
    pub fn lazy_ranges(&self) -> Vec<(PageOwner, Range<u64>)> {
        if !self.lazy {
            return Vec::new();
        }
        self.owners
            .iter()
            .filter(|(owner, _)| matches!(owner, PageOwner::Task(_)))
            .flat_map(|(owner, memory)| {
                memory
                    .runs
                    .iter()
                    .filter(|run| run.flags & LAZY != 0)
                    .map(|run| (*owner, run.vaddr..run.end()))
            })
            .collect()
    }

    /// Decides which gaps can wait: that is known once the mappings have come.
    fn settle(&mut self) -> Result<(), CriuError> {
        if !self.lazy {
            return Ok(());
        }
        let mut mappings = BTreeMap::new();
        for name in &self.whole_images {
            let Some(pid) = name
                .strip_prefix("mm-")
                .and_then(|name| name.strip_suffix(".img")?.parse::<u32>().ok())
            else {
                continue;
            };
            mappings.insert(pid, read_image(&self.path.join(name), decode_mm)?);
        }
        let locked: Vec<Range<u64>> = mappings
            .values()
            .flat_map(|mm| &mm.vmas)
            .filter(|vma| vma.is_locked())
            .map(|vma| vma.start..vma.end)
            .collect();
        for (owner, memory) in &mut self.owners {
            let PageOwner::Task(pid) = owner else {
                continue;
            };
            if memory.gaps.is_empty() && memory.runs.iter().all(|run| run.flags & LAZY == 0) {
                continue;
            }
            let mm = mappings.get(pid).ok_or_else(|| CriuError::ImageData {
                what: format!("there is no mm-{pid}.img"),
            })?;
            memory.settle(mm, &locked);
        }
        self.stats.lazy_pages = self
            .lazy_ranges()
            .iter()
            .map(|(_, range)| (range.end - range.start) / PAGE_BYTES as u64)
            .sum();
        Ok(())
    }

    /// Takes a run of pages with their data.
    ///
    /// # Errors
    ///
    /// The run is not above the last one of its owner, has no data, or cannot
    /// be written.
    pub fn pages(&mut self, run: PageRun, data: &[u8]) -> Result<(), CriuError> {
        self.still_open()?;
        if run.flags & PageRun::PRESENT == 0 {
            return Err(malformed("a run of pages without data", run));
        }
        if !has_content(run.flags) || run.data_bytes() != data.len() as u64 {
            return Err(malformed("a malformed run of pages", run));
        }
        let leave_out = self.leaves_out(&run);
        let at = self.append(run)?;
        self.stats.pages += run.pages;
        if leave_out {
            return Ok(());
        }
        let (file, path) = self.pages_file(run.owner)?;
        file.write_all_at(data, at * PAGE_BYTES as u64)
            .map_err(|source| CriuError::image("write", path, source))
    }

    /// Notes a run of pages whose data comes when the copy already runs:
    /// [`leaves_out`](Self::leaves_out) is true of it, and nobody will have it to
    /// [`fill`](Self::fill) a gap with.
    ///
    /// # Errors
    ///
    /// The run cannot wait, or is not above the last one of its owner.
    pub fn later(&mut self, run: PageRun) -> Result<(), CriuError> {
        self.still_open()?;
        if !self.leaves_out(&run) || run.flags & !LAZY != PageRun::LATE {
            return Err(malformed("a run of pages that cannot wait", run));
        }
        let flags = LAZY | PageRun::PRESENT;
        self.append(PageRun { flags, ..run })?;
        self.stats.pages += run.pages;
        Ok(())
    }

    /// Takes a run of pages without data, with the flag [`PARENT`]: their
    /// content is left open until [`fill`](Self::fill).
    ///
    /// # Errors
    ///
    /// The run is not above the last one of its owner, or has not that flag.
    pub fn gap(&mut self, run: PageRun) -> Result<(), CriuError> {
        self.still_open()?;
        if run.flags & !LAZY != PARENT {
            return Err(malformed("a run of pages that are nowhere", run));
        }
        // To CRIU they are pages like all others; whether they can wait is seen
        // when the mappings have come.
        let flags = PageRun::PRESENT;
        let at = self.append(PageRun { flags, ..run })?;
        if let Some(memory) = self.owners.get_mut(&run.owner) {
            memory.gap(at, run);
        }
        self.stats.pages_in_gaps += run.pages;
        Ok(())
    }

    /// Writes the content of all gaps, owner by owner in ascending order of
    /// addresses. More may come afterwards; it may be called again.
    ///
    /// # Errors
    ///
    /// A page is not in store, or cannot be written; with [`lazy`](Self::lazy),
    /// the mappings of a task have not come. The directory can then not be
    /// finished.
    pub fn fill(&mut self, filler: &mut dyn Filler) -> Result<(), CriuError> {
        self.still_open()?;
        self.settle()?;
        for (owner, memory) in &mut self.owners {
            if memory.gaps.is_empty() {
                continue;
            }
            let path = self.path.join(pages_name(memory.pages_id));
            memory.fill(&open_pages(&path)?, &path, *owner, filler)?;
        }
        Ok(())
    }

    /// Writes the content of the gaps that a segment has so far, which cannot
    /// wait: then [`fill`](Self::fill) has less to do when everybody waits for it.
    ///
    /// # Errors
    ///
    /// As for [`fill`](Self::fill).
    pub fn fill_segment(&mut self, id: u64, filler: &mut dyn Filler) -> Result<(), CriuError> {
        self.still_open()?;
        let owner = PageOwner::Shared(id);
        if !self.owners.contains_key(&owner) {
            return Ok(());
        }
        // The one that its pages with data go to; runs of both kinds take turns.
        let (_, path) = self.pages_file(owner)?;
        match (&self.open_pages, self.owners.get_mut(&owner)) {
            (Some((_, file)), Some(memory)) => memory.fill(file, &path, owner, filler),
            _ => Ok(()),
        }
    }

    /// Finds the place of a run in its owner's file, counted in pages.
    fn append(&mut self, run: PageRun) -> Result<u64, CriuError> {
        if run.pages == 0
            || !run.vaddr.is_multiple_of(PAGE_BYTES as u64)
            || run
                .pages
                .checked_mul(PAGE_BYTES as u64)
                .and_then(|bytes| run.vaddr.checked_add(bytes))
                .is_none()
        {
            return Err(malformed("a malformed run of pages", run));
        }
        let next_id = self.owners.len() + 1;
        if next_id > OWNERS_MAX {
            return Err(malformed("too many owners of memory", run));
        }
        let memory = match self.owners.entry(run.owner) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => entry.insert(Memory {
                pages_id: u32::try_from(next_id)
                    .map_err(|_| malformed("too many owners of memory", run))?,
                runs: Vec::new(),
                pages: 0,
                gaps: Vec::new(),
                waiting: Vec::new(),
            }),
        };
        if let Some(previous_end) = memory.runs.last().map(|last| last.end())
            && run.vaddr < previous_end
        {
            return Err(CriuError::PageOrder {
                owner: run.owner,
                vaddr: run.vaddr,
                previous_end,
            });
        }
        Ok(memory.add(run))
    }

    /// Opens the file for the pages of an owner that has some.
    fn pages_file(&mut self, owner: PageOwner) -> Result<(&File, PathBuf), CriuError> {
        let id = self.owners.get(&owner).map_or(0, |memory| memory.pages_id);
        let path = self.path.join(pages_name(id));
        let open = match self.open_pages.take() {
            Some(open) if open.0 == owner => open,
            _ => (owner, open_pages(&path)?),
        };
        Ok((&self.open_pages.insert(open).1, path))
    }

    /// Takes a piece of another image; the pieces of one file come in order.
    ///
    /// # Errors
    ///
    /// The name is not acceptable or was complete before, or it cannot be
    /// written.
    pub fn image_piece(&mut self, piece: &ImagePiece<'_>) -> Result<(), CriuError> {
        let name = piece.name;
        self.still_open()?;
        if !sendable(name) || carries_memory(name) || self.whole_images.contains(name) {
            return Err(CriuError::ImageData {
                what: format!("image name {name:?}"),
            });
        }
        let path = self.path.join(match name {
            INVENTORY => self.inventory_name,
            other => other,
        });
        let file = match self.open_images.entry(name.to_owned()) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                if self.whole_images.len() >= IMAGES_MAX {
                    return Err(CriuError::ImageData {
                        what: "too many images".to_owned(),
                    });
                }
                entry.insert(
                    private()
                        .write(true)
                        .create_new(true)
                        .open(&path)
                        .map_err(|source| CriuError::image("create", &path, source))?,
                )
            }
        };
        file.write_all(piece.data)
            .map_err(|source| CriuError::image("write", &path, source))?;
        self.stats.image_bytes += piece.data.len() as u64;
        if piece.last {
            self.open_images.remove(name);
            self.whole_images.insert(name.to_owned());
            self.stats.images += 1;
        }
        Ok(())
    }

    /// Writes the page maps; the directory is then ready for a restore.
    ///
    /// # Errors
    ///
    /// An image is incomplete, there is no inventory, a gap has not been
    /// filled, or a map cannot be written.
    pub fn finish(&mut self) -> Result<ImageStats, CriuError> {
        self.still_open()?;
        if let Some(name) = self.open_images.keys().next() {
            return Err(CriuError::ImageData {
                what: format!("{name} is not complete"),
            });
        }
        if !self.whole_images.contains(INVENTORY) {
            return Err(CriuError::ImageData {
                what: format!("there is no {INVENTORY}"),
            });
        }
        self.settle()?;
        if let Some((owner, gap)) = self
            .owners
            .iter()
            .find_map(|(owner, memory)| Some((owner, memory.gaps.first()?)))
        {
            return Err(CriuError::PageMissing {
                owner: *owner,
                vaddr: gap.vaddr,
                source: None,
            });
        }
        self.open_pages = None;
        for memory in self.owners.values() {
            // Lazy pages leave holes, which take up no memory.
            let path = self.path.join(pages_name(memory.pages_id));
            open_pages(&path)?
                .set_len(memory.pages * PAGE_BYTES as u64)
                .map_err(|source| CriuError::image("write", &path, source))?;
        }
        for (owner, memory) in &self.owners {
            let name = match owner {
                PageOwner::Task(pid) => format!("pagemap-{pid}.img"),
                PageOwner::Shared(id) => format!("pagemap-shmem-{id}.img"),
            };
            let path = self.path.join(name);
            private()
                .write(true)
                .create_new(true)
                .open(&path)
                .and_then(|mut file| file.write_all(&memory.encode()))
                .map_err(|source| CriuError::image("write", &path, source))?;
        }
        self.finished = true;
        Ok(self.stats)
    }

    /// Whom each task and thread would run as, by the name of its image.
    ///
    /// # Errors
    ///
    /// There is none, or one cannot be read.
    pub fn credentials(&self) -> Result<Vec<(String, Credentials)>, CriuError> {
        let mut found = Vec::new();
        for name in &self.whole_images {
            if !name.starts_with("core-") {
                continue;
            }
            let path = self.path.join(name);
            let image =
                fs::read(&path).map_err(|source| CriuError::image("read", &path, source))?;
            if has_ended(&image) {
                continue;
            }
            let credentials = decode_credentials(&image).ok_or_else(|| CriuError::ImageData {
                what: format!("{name} does not say whom it runs as"),
            })?;
            found.push((name.clone(), credentials));
        }
        if found.is_empty() {
            return Err(CriuError::ImageData {
                what: "there is no task".to_owned(),
            });
        }
        Ok(found)
    }

    fn still_open(&self) -> Result<(), CriuError> {
        if self.finished {
            return Err(CriuError::ImageData {
                what: "the image directory is complete".to_owned(),
            });
        }
        Ok(())
    }

    /// Removes the directory with everything in it.
    ///
    /// # Errors
    ///
    /// It cannot be removed.
    pub fn wipe(mut self) -> Result<(), CriuError> {
        let path = std::mem::take(&mut self.path);
        fs::remove_dir_all(&path).map_err(|source| CriuError::image("remove", path, source))
    }

    /// Leaves the directory in place for good and returns its path, for
    /// someone who wants to look at a failure.
    #[must_use]
    pub fn keep(mut self) -> PathBuf {
        std::mem::take(&mut self.path)
    }
}

impl Drop for ImageDir {
    fn drop(&mut self) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        match fs::remove_dir_all(&self.path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(path = %self.path.display(), %error, "images could not be removed");
            }
        }
    }
}

impl Memory {
    /// Writes the content of all gaps.
    fn fill(
        &mut self,
        file: &File,
        path: &Path,
        owner: PageOwner,
        filler: &mut dyn Filler,
    ) -> Result<(), CriuError> {
        for gap in &self.gaps {
            fill_gap(file, path, owner, *gap, filler)?;
        }
        self.gaps.clear();
        Ok(())
    }

    /// Appends a run and returns its place in the file, counted in pages.
    fn add(&mut self, run: PageRun) -> u64 {
        let at = self.pages;
        self.pages += run.pages;
        self.push(Run {
            vaddr: run.vaddr,
            pages: run.pages,
            flags: run.flags,
        });
        at
    }

    fn push(&mut self, run: Run) {
        match self.runs.last_mut() {
            Some(last)
                if last.end() == run.vaddr
                    && last.flags == run.flags
                    // The old field for the count has 32 bits.
                    && last.pages + run.pages <= u64::from(u32::MAX) =>
            {
                last.pages += run.pages;
            }
            _ => self.runs.push(run),
        }
    }

    fn gap(&mut self, at: u64, run: PageRun) {
        match self.gaps.last_mut() {
            // Asked for at once.
            Some(last)
                if last.at + last.pages == at
                    && last.vaddr + last.pages * PAGE_BYTES as u64 == run.vaddr =>
            {
                last.pages += run.pages;
            }
            _ => self.gaps.push(Gap {
                at,
                vaddr: run.vaddr,
                pages: run.pages,
            }),
        }
    }

    /// Makes gaps of what would be lazy in these mappings.
    fn hold<'a>(&mut self, mappings: impl Iterator<Item = &'a VmaEntry>) {
        let page = PAGE_BYTES as u64;
        for mapping in mappings {
            let mut place = 0;
            for run in std::mem::take(&mut self.runs) {
                let start = mapping.start.clamp(run.vaddr, run.end());
                let stop = mapping.end.clamp(start, run.end());
                if run.flags & LAZY == 0 || start == stop {
                    self.push(run);
                } else {
                    for (part, flags) in [
                        (run.vaddr..start, run.flags),
                        (start..stop, run.flags & !LAZY),
                        (stop..run.end(), run.flags),
                    ] {
                        if !part.is_empty() {
                            self.push(Run {
                                vaddr: part.start,
                                pages: (part.end - part.start) / page,
                                flags,
                            });
                        }
                    }
                    self.gaps.push(Gap {
                        at: place + (start - run.vaddr) / page,
                        vaddr: start,
                        pages: (stop - start) / page,
                    });
                }
                place += run.pages;
            }
        }
        self.gaps.sort_by_key(|gap| gap.vaddr);
    }

    /// Makes lazy what lies in gaps and in mappings that can be.
    /// `locked` is memory that some task of the tree has locked in.
    fn settle(&mut self, mm: &MmEntry, locked: &[Range<u64>]) {
        let (held, waiting): (Vec<_>, Vec<_>) = mm
            .vmas
            .iter()
            .filter(|vma| vma.can_be_lazy())
            .partition(|vma| vma.is_wiped_on_fork() || vma.meets(locked));
        self.hold(held.into_iter());
        let mut mappings: Vec<Range<u64>> =
            waiting.into_iter().map(|vma| vma.start..vma.end).collect();
        mappings.sort_by_key(|range| range.start);
        let page = PAGE_BYTES as u64;
        let mut lazy: Vec<Range<u64>> = Vec::new();
        let mut left: Vec<Gap> = Vec::new();
        let mut next = 0;
        for gap in std::mem::take(&mut self.gaps) {
            let end = gap.vaddr + gap.pages * page;
            while mappings
                .get(next)
                .is_some_and(|range| range.end <= gap.vaddr)
            {
                next += 1;
            }
            let mut at = gap.vaddr;
            let mut keep = |range: Range<u64>| {
                if !range.is_empty() {
                    left.push(Gap {
                        at: gap.at + (range.start - gap.vaddr) / page,
                        vaddr: range.start,
                        pages: (range.end - range.start) / page,
                    });
                }
            };
            for mapping in mappings[next..]
                .iter()
                .take_while(|range| range.start < end)
            {
                let (start, stop) = (mapping.start.max(at), mapping.end.min(end));
                if start < stop {
                    keep(at..start);
                    lazy.push(start..stop);
                    at = stop;
                }
            }
            keep(at..end);
        }
        self.gaps = left;
        self.waiting = mappings;
        let mut lazy = lazy.into_iter().peekable();
        for run in std::mem::take(&mut self.runs) {
            let mut at = run.vaddr;
            while at < run.end() {
                while lazy.next_if(|range| range.end <= at).is_some() {}
                let (stop, flags) = match lazy.peek() {
                    Some(range) if range.start <= at => {
                        (range.end.min(run.end()), run.flags | LAZY)
                    }
                    Some(range) => (range.start.min(run.end()), run.flags),
                    None => (run.end(), run.flags),
                };
                self.push(Run {
                    vaddr: at,
                    pages: (stop - at) / page,
                    flags,
                });
                at = stop;
            }
        }
    }

    /// The runs as CRIU gets them. It reads and forgets each entry by itself, half a
    /// microsecond and more while everybody waits, and of pages that can wait it wants to
    /// know nothing. So those of a mapping are one run, whatever is between them: nothing,
    /// which reads as zeros with the one and with the other.
    fn entries(&self) -> Vec<Run> {
        let page = PAGE_BYTES as u64;
        let mut entries: Vec<Run> = Vec::new();
        let mut mappings = self.waiting.iter().peekable();
        let mut runs = self.runs.iter().copied().peekable();
        while let Some(first) = runs.next() {
            while mappings.next_if(|range| range.end <= first.vaddr).is_some() {}
            let mapping = mappings.peek().filter(|range| range.start <= first.vaddr);
            let (mut last, mut pages) = (first, first.pages);
            while first.flags & LAZY != 0
                && let Some(next) = runs.next_if(|next| {
                    next.flags == first.flags
                        && mapping.is_some_and(|range| next.end() <= range.end)
                })
            {
                last = next;
                pages += next.pages;
            }
            // All that have a place in the file, and then those that have none.
            let placed = Run { pages, ..first };
            entries.push(placed);
            if last.vaddr > first.vaddr && placed.end() < last.end() {
                entries.push(Run {
                    vaddr: placed.end(),
                    pages: (last.end() - placed.end()) / page,
                    flags: first.flags & !PageRun::PRESENT,
                });
            }
        }
        entries
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(COMMON_MAGIC.to_le_bytes());
        out.extend(PAGEMAP_MAGIC.to_le_bytes());
        record(
            &mut out,
            &PagemapHead {
                pages_id: self.pages_id,
            },
        );
        for run in self.entries() {
            record(
                &mut out,
                &PagemapEntry {
                    vaddr: run.vaddr,
                    compat_nr_pages: u32::try_from(run.pages).unwrap_or(0),
                    flags: Some(run.flags),
                    nr_pages: Some(run.pages),
                },
            );
        }
        out
    }
}

/// Reads the mappings of a task.
fn decode_mm(image: &[u8]) -> Option<MmEntry> {
    decode_one(image, MM_MAGIC).filter(|mm: &MmEntry| mm.vmas.iter().all(VmaEntry::is_sound))
}

/// Where a task's image of its mappings (`mm-PID.img`) has a guard page
/// (`MADV_GUARD_INSTALL`) within locked memory. CRIU maps memory as locked before it
/// makes guards (`restore_madv_guard_regions` in 4.2), which Linux refuses there
/// (`is_valid_guard_vma` in 6.18).
#[must_use]
pub fn guard_in_locked(image: &[u8]) -> Option<Range<u64>> {
    let mm = decode_mm(image)?;
    let (guards, mappings): (Vec<_>, Vec<_>) = mm
        .vmas
        .iter()
        .partition(|vma| vma.status & VmaEntry::GUARD != 0);
    let locked = |guard: &&VmaEntry| {
        mappings
            .iter()
            .any(|vma| vma.is_locked() && vma.start < guard.end && guard.start < vma.end)
    };
    let guard = guards.into_iter().find(locked)?;
    Some(guard.start..guard.end)
}

/// Whether a task runs as nobody, because it does not run.
fn has_ended(image: &[u8]) -> bool {
    decode_one::<CoreEntry>(image, CORE_MAGIC).is_some_and(|core| {
        let dead = |task: &TaskEntry| task.state == TaskEntry::DEAD;
        core.thread.is_none() && core.task.as_ref().is_some_and(dead)
    })
}

/// Reads whom a task or thread runs as.
fn decode_credentials(image: &[u8]) -> Option<Credentials> {
    let creds = decode_one::<CoreEntry>(image, CORE_MAGIC)?.thread?.creds?;
    let mut capabilities = creds.inheritable.iter();
    Some(Credentials {
        users: [creds.uid, creds.euid, creds.suid, creds.fsuid].into(),
        privileged: capabilities.any(|word| *word != 0)
            || creds.permitted.iter().any(|word| *word != 0)
            || creds.effective.iter().any(|word| *word != 0),
    })
}

/// Reads an image as each kind that is read here, and a page map once more from
/// what would be written of it. For the fuzz targets.
#[doc(hidden)]
pub fn read_any_image(image: &[u8]) {
    let _ = (
        decode_mm(image),
        has_ended(image),
        decode_credentials(image),
    );
    let Some((pages_id, runs)) = decode_pagemap(image) else {
        return;
    };
    let memory = Memory {
        pages_id,
        pages: 0,
        gaps: Vec::new(),
        waiting: Vec::new(),
        runs,
    };
    let again = decode_pagemap(&memory.encode());
    assert_eq!(again, Some((pages_id, memory.runs)));
}

/// Reads an image file as a whole.
fn read_image<T>(path: &Path, decode: impl FnOnce(&[u8]) -> Option<T>) -> Result<T, CriuError> {
    let image = fs::read(path).map_err(|source| CriuError::image("read", path, source))?;
    decode(&image).ok_or_else(|| CriuError::ImageData {
        what: format!("{} is malformed", path.display()),
    })
}

/// Reads an image that has one record.
fn decode_one<M: Message + Default>(image: &[u8], magic: u32) -> Option<M> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    };
    if word(0)? != COMMON_MAGIC || word(4)? != magic {
        return None;
    }
    let length = usize::try_from(word(8)?).ok()?;
    M::decode(image.get(12..)?.get(..length)?).ok()
}

fn malformed(what: &str, run: PageRun) -> CriuError {
    CriuError::ImageData {
        what: format!("{what} ({run:?})"),
    }
}

fn pages_name(id: u32) -> String {
    format!("pages-{id}.img")
}

fn open_pages(path: &Path) -> Result<File, CriuError> {
    private()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(|source| CriuError::image("open", path, source))
}

fn fill_gap(
    file: &File,
    path: &Path,
    owner: PageOwner,
    gap: Gap,
    filler: &mut dyn Filler,
) -> Result<(), CriuError> {
    let mut out = GapWriter {
        file,
        at: gap.at * PAGE_BYTES as u64,
        left: gap.pages * PAGE_BYTES as u64,
        failure: None,
    };
    let filled = filler.fill(owner, gap.vaddr, gap.pages, &mut out);
    if let Some(source) = out.failure {
        return Err(CriuError::image("write", path, source));
    }
    if filled.is_ok() && out.left == 0 {
        return Ok(());
    }
    let written = gap.pages - out.left.div_ceil(PAGE_BYTES as u64);
    Err(CriuError::PageMissing {
        owner,
        vaddr: gap.vaddr + written * PAGE_BYTES as u64,
        source: filled.err(),
    })
}

/// Writes to one gap and not beyond it.
struct GapWriter<'a> {
    file: &'a File,
    at: u64,
    left: u64,
    /// Why the file took no more, which the filler may keep to itself.
    failure: Option<io::Error>,
}

impl io::Write for GapWriter<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if data.len() as u64 > self.left {
            let what = "more bytes than there are pages";
            self.failure = Some(io::Error::new(io::ErrorKind::InvalidData, what));
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        let written = self.file.write_at(data, self.at).inspect_err(|error| {
            if error.kind() != io::ErrorKind::Interrupted {
                self.failure = error.raw_os_error().map(io::Error::from_raw_os_error);
            }
        })?;
        self.at += written as u64;
        self.left -= written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Appends a message with its size before it, as in every CRIU image.
fn record(out: &mut Vec<u8>, message: &impl Message) {
    let body = message.encode_to_vec();
    let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
    out.extend(size.to_le_bytes());
    out.extend(body);
}

pub(crate) fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600);
    options
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_page_map_is_read_as_it_was_written() {
        let mut memory = Memory {
            pages_id: 3,
            runs: Vec::new(),
            pages: 0,
            gaps: Vec::new(),
            waiting: Vec::new(),
        };
        for (vaddr, pages) in [(0x1000, 2), (0x9000, 1), (0x7f00_0000_0000, 300)] {
            memory.add(PageRun {
                owner: PageOwner::Task(7),
                vaddr,
                pages,
                flags: PageRun::PRESENT,
            });
        }
        let image = memory.encode();
        assert_eq!(decode_pagemap(&image), Some((3, memory.runs.clone())));
        // What no CRIU writes, and what it would look for elsewhere.
        for flags in [0, LAZY, PARENT, PageRun::PRESENT | 1 << 3] {
            let mut other = Memory {
                pages_id: memory.pages_id,
                runs: memory.runs.clone(),
                pages: memory.pages,
                gaps: Vec::new(),
                waiting: Vec::new(),
            };
            other.runs[1].flags = flags;
            assert_eq!(decode_pagemap(&other.encode()), None, "{flags:#x}");
        }
        // Cut anywhere, it is refused or is a map with fewer runs.
        for end in 0..image.len() {
            if let Some((_, runs)) = decode_pagemap(&image[..end]) {
                assert!(runs.len() < memory.runs.len(), "{end}");
            }
        }
        assert_eq!(owner_of_map("pagemap-7.img"), Some(PageOwner::Task(7)));
        assert_eq!(
            owner_of_map("pagemap-shmem-9.img"),
            Some(PageOwner::Shared(9))
        );
        assert_eq!(owner_of_map("pages-9.img"), None);
    }

    fn directory() -> (tempfile::TempDir, ImageDir) {
        let parent = tempfile::tempdir_in("/dev/shm").unwrap();
        let images = ImageDir::create(parent.path().join("images")).unwrap();
        (parent, images)
    }

    fn run(owner: PageOwner, vaddr: u64, pages: u64) -> PageRun {
        PageRun {
            owner,
            vaddr,
            pages,
            flags: PageRun::PRESENT,
        }
    }

    fn filled(pages: u64, with: u8) -> Vec<u8> {
        vec![with; usize::try_from(pages).unwrap() * PAGE_BYTES]
    }

    fn core(users: [u32; 4], capabilities: [u32; 3]) -> Vec<u8> {
        let mut image = COMMON_MAGIC.to_le_bytes().to_vec();
        image.extend(CORE_MAGIC.to_le_bytes());
        let creds = CredsEntry {
            uid: users[0],
            euid: users[1],
            suid: users[2],
            fsuid: users[3],
            inheritable: vec![0, capabilities[0]],
            permitted: vec![0, capabilities[1]],
            effective: vec![0, capabilities[2]],
        };
        let thread = ThreadEntry { creds: Some(creds) };
        let core = CoreEntry {
            task: None,
            thread: Some(thread),
        };
        record(&mut image, &core);
        image
    }

    #[test]
    fn only_what_has_ended_need_not_say_whom_it_runs_as() {
        // As CRIU writes them: `mtype`, then in `tc` the state and the exit code.
        let without_thread = |state: u8, exit_code: u8| {
            let core = [0x08, 1, 0x1a, 4, 0x08, state, 0x10, exit_code];
            let mut image = COMMON_MAGIC.to_le_bytes().to_vec();
            image.extend(CORE_MAGIC.to_le_bytes());
            image.extend(8u32.to_le_bytes());
            image.extend(core);
            image
        };
        // Alive, stopped, helper, thread, zombie to CRIU.
        for state in [0, 1, 3, 4, 5, 6] {
            for exit_code in [0, 2, 9] {
                assert!(has_ended(&without_thread(2, exit_code)));
                assert!(!has_ended(&without_thread(state, exit_code)), "{state}");
            }
        }
        assert!(!has_ended(&core([9; 4], [0; 3])));
    }

    #[test]
    fn images_say_whom_they_run_as() {
        for (place, user) in [0, 1, 2, 3].into_iter().zip([5, 6, 7, 8]) {
            let mut users = [9; 4];
            users[place] = user;
            let said = decode_credentials(&core(users, [0; 3])).unwrap();
            assert_eq!(said.users, [user, 9].into());
            assert!(!said.privileged);
        }
        for place in 0..3 {
            let mut capabilities = [0; 3];
            capabilities[place] = 1;
            assert!(
                decode_credentials(&core([9; 4], capabilities))
                    .unwrap()
                    .privileged
            );
        }
    }

    #[test]
    fn an_image_that_does_not_say_whom_it_runs_as_is_refused() {
        let whole = core([9; 4], [1; 3]);
        for cut in 0..whole.len() {
            assert_eq!(decode_credentials(&whole[..cut]), None, "{cut}");
        }
        let (_parent, mut images) = directory();
        assert!(images.credentials().is_err(), "no task at all");
        for (name, data) in [("core-7.img", &whole[..]), ("core-8.img", b"?")] {
            let piece = ImagePiece {
                name,
                last: true,
                data,
            };
            images.image_piece(&piece).unwrap();
            assert_eq!(images.credentials().is_ok(), name == "core-7.img");
        }
    }

    fn inventory(images: &mut ImageDir) {
        images
            .image_piece(&ImagePiece {
                name: "inventory.img",
                last: true,
                data: b"i",
            })
            .unwrap();
    }

    fn decode(bytes: &[u8]) -> (PagemapHead, Vec<PagemapEntry>) {
        assert_eq!(bytes[..4], COMMON_MAGIC.to_le_bytes());
        assert_eq!(bytes[4..8], PAGEMAP_MAGIC.to_le_bytes());
        let mut rest = &bytes[8..];
        let mut records = Vec::new();
        while !rest.is_empty() {
            let size = u32::from_le_bytes(rest[..4].try_into().unwrap()) as usize;
            records.push(&rest[4..4 + size]);
            rest = &rest[4 + size..];
        }
        let head = PagemapHead::decode(records.remove(0)).unwrap();
        let entries = records
            .into_iter()
            .map(|r| PagemapEntry::decode(r).unwrap())
            .collect();
        (head, entries)
    }

    /// Bytes made by hand from `images/pagemap.proto`.
    #[test]
    fn a_pagemap_has_the_bytes_criu_expects() {
        let (_parent, mut images) = directory();
        let task = PageOwner::Task(7);
        images.pages(run(task, 0x1000, 2), &filled(2, 1)).unwrap();
        images.pages(run(task, 0x3000, 1), &filled(1, 2)).unwrap();
        images.pages(run(task, 0x8000, 1), &filled(1, 3)).unwrap();
        inventory(&mut images);
        images.finish().unwrap();
        let mut expected = vec![0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56];
        expected.extend([2, 0, 0, 0, 0x08, 1]);
        expected.extend([9, 0, 0, 0, 0x08, 0x80, 0x20, 0x10, 3, 0x20, 4, 0x28, 3]);
        expected.extend([
            10, 0, 0, 0, 0x08, 0x80, 0x80, 0x02, 0x10, 1, 0x20, 4, 0x28, 1,
        ]);
        assert_eq!(
            fs::read(images.path().join("pagemap-7.img")).unwrap(),
            expected
        );
        let pages = fs::read(images.path().join("pages-1.img")).unwrap();
        assert_eq!(pages, [filled(2, 1), filled(1, 2), filled(1, 3)].concat());
    }

    #[test]
    fn disorder_and_missing_data_are_refused() {
        let (_parent, mut images) = directory();
        let task = PageOwner::Task(7);
        images.pages(run(task, 0x4000, 2), &filled(2, 1)).unwrap();
        let below = images.pages(run(task, 0x5000, 1), &filled(1, 1));
        assert!(matches!(below, Err(CriuError::PageOrder { .. })));
        let short = images.pages(run(task, 0x9000, 2), &filled(1, 1));
        assert!(matches!(short, Err(CriuError::ImageData { .. })));
        let parent = PageRun {
            flags: 1,
            ..run(task, 0x9000, 1)
        };
        assert!(images.pages(parent, &[]).is_err());
        assert_eq!(images.stats().pages, 2);
    }

    fn gap(owner: PageOwner, vaddr: u64, pages: u64) -> PageRun {
        PageRun {
            flags: PARENT,
            ..run(owner, vaddr, pages)
        }
    }

    /// A store in which the page at `vaddr` is full of one byte.
    fn stored(vaddr: u64) -> u8 {
        u8::try_from(vaddr / PAGE_BYTES as u64 % 251).unwrap()
    }

    fn from_store(_: PageOwner, vaddr: u64, pages: u64, out: &mut dyn io::Write) -> io::Result<()> {
        for page in 0..pages {
            out.write_all(&filled(1, stored(vaddr + page * PAGE_BYTES as u64)))?;
        }
        Ok(())
    }

    #[test]
    fn gaps_are_filled_where_they_are() {
        let (_parent, mut images) = directory();
        let task = PageOwner::Task(7);
        let other = PageOwner::Task(8);
        images.gap(gap(task, 0x1000, 2)).unwrap();
        images
            .pages(run(task, 0x3000, 1), &filled(1, 0xee))
            .unwrap();
        images.gap(gap(task, 0x4000, 1)).unwrap();
        images.gap(gap(task, 0x5000, 1)).unwrap();
        images.gap(gap(other, 0x9000, 1)).unwrap();
        inventory(&mut images);

        let error = images.finish().unwrap_err();
        assert!(
            matches!(
                &error,
                CriuError::PageMissing {
                    owner: PageOwner::Task(7),
                    vaddr: 0x1000,
                    ..
                }
            ),
            "{error}"
        );
        let mut asked = Vec::new();
        images
            .fill(
                &mut |owner, vaddr, pages, out: &mut dyn io::Write| -> io::Result<()> {
                    asked.push((owner, vaddr, pages));
                    from_store(owner, vaddr, pages, out)
                },
            )
            .unwrap();
        // Neighbours are asked for at once.
        assert_eq!(
            asked,
            [(task, 0x1000, 2), (task, 0x4000, 2), (other, 0x9000, 1)]
        );
        let stats = images.finish().unwrap();
        assert_eq!((stats.pages, stats.pages_in_gaps), (1, 5));
        let pages = fs::read(images.path().join("pages-1.img")).unwrap();
        let expected = [
            stored(0x1000),
            stored(0x2000),
            0xee,
            stored(0x4000),
            stored(0x5000),
        ];
        assert_eq!(pages, expected.map(|byte| filled(1, byte)).concat());
        // To CRIU it is one run of pages.
        let (_, entries) = decode(&fs::read(images.path().join("pagemap-7.img")).unwrap());
        assert_eq!(entries.len(), 1);
        assert_eq!(
            (entries[0].nr_pages, entries[0].flags),
            (Some(5), Some(PageRun::PRESENT))
        );
    }

    #[test]
    fn what_the_store_lacks_is_named() {
        type Fill = fn(PageOwner, u64, u64, &mut dyn io::Write) -> io::Result<()>;
        let cases: [(Fill, u64, bool); 4] = [
            (|_, _, _, _| Ok(()), 0x1000, false),
            (|_, _, _, _| Err(io::Error::other("no")), 0x1000, true),
            (|_, _, _, out| out.write_all(&filled(2, 1)), 0x3000, false),
            // Half a page is none.
            (
                |_, _, _, out| out.write_all(&filled(2, 1)[..PAGE_BYTES + 9]),
                0x2000,
                false,
            ),
        ];
        for (mut fill, missing, explained) in cases {
            let (_parent, mut images) = directory();
            images.gap(gap(PageOwner::Task(7), 0x1000, 3)).unwrap();
            inventory(&mut images);
            let error = images.fill(&mut fill).unwrap_err();
            let CriuError::PageMissing {
                owner,
                vaddr,
                source,
            } = error
            else {
                panic!("{error}");
            };
            assert_eq!(
                (owner, vaddr, source.is_some()),
                (PageOwner::Task(7), missing, explained)
            );
            assert!(images.finish().is_err());
            // Another store may have it.
            images.fill(&mut from_store).unwrap();
            images.finish().unwrap();
        }
    }

    #[test]
    fn a_gap_takes_no_more_than_its_pages() {
        let (_parent, mut images) = directory();
        let task = PageOwner::Task(7);
        images.gap(gap(task, 0x1000, 1)).unwrap();
        images.pages(run(task, 0x2000, 1), &filled(1, 9)).unwrap();
        let result = images.fill(&mut |_, _, _, out: &mut dyn io::Write| -> io::Result<()> {
            let _ = out.write_all(&filled(2, 1));
            Ok(())
        });
        assert!(matches!(result, Err(CriuError::Image { .. })), "{result:?}");
        for run in [
            run(task, 0x8000, 1),
            PageRun {
                flags: 2,
                ..run(task, 0x8000, 1)
            },
        ] {
            assert!(images.gap(run).is_err(), "{run:?}");
        }
        assert!(
            images.gap(gap(task, 0x1000, 1)).is_err(),
            "below the last one"
        );
    }

    fn mapping(start: u64, end: u64, flags: i32, status: u32) -> VmaEntry {
        VmaEntry {
            start,
            end,
            flags: flags.cast_unsigned(),
            status,
            advice: None,
        }
    }

    /// Anonymous, private, and nothing special.
    fn plain(start: u64, end: u64) -> VmaEntry {
        mapping(start, end, 0x22, 1 << 9 | 1)
    }

    fn encoded_mm(vmas: Vec<VmaEntry>) -> Vec<u8> {
        let mut data = COMMON_MAGIC.to_le_bytes().to_vec();
        data.extend(MM_MAGIC.to_le_bytes());
        record(&mut data, &MmEntry { vmas });
        data
    }

    #[test]
    fn a_guard_page_is_found_in_locked_memory_only() {
        let guard = mapping(0x5000, 0x7000, 0, 1 << 16);
        let locked = |start, end| mapping(start, end, 0x22 | libc::MAP_LOCKED, 1 << 9 | 1);
        let found = |vmas| guard_in_locked(&encoded_mm(vmas));
        let open = plain(0x4000, 0x8000);
        assert_eq!(
            found(vec![locked(0x1000, 0x5000), open, guard.clone()]),
            None
        );
        let both = vec![locked(0x6000, 0x9000), plain(0x4000, 0x6000), guard];
        assert_eq!(found(both), Some(0x5000..0x7000));
        assert_eq!(found(vec![locked(0x6000, 0x9000)]), None);
        assert_eq!(guard_in_locked(b"nothing of that kind"), None);
    }

    fn mm(images: &mut ImageDir, pid: u32, vmas: Vec<VmaEntry>) {
        let data = encoded_mm(vmas);
        images
            .image_piece(&ImagePiece {
                name: &format!("mm-{pid}.img"),
                last: true,
                data: &data,
            })
            .unwrap();
    }

    #[test]
    fn what_can_wait_leaves_a_hole() {
        let (_parent, mut images) = directory();
        images.lazy().unwrap();
        let (task, shared) = (PageOwner::Task(7), PageOwner::Shared(7));
        let lazy = |owner, vaddr, pages| PageRun {
            flags: PageRun::PRESENT | LAZY,
            ..run(owner, vaddr, pages)
        };
        assert!(images.leaves_out(&lazy(task, 0x1000, 2)));
        assert!(!images.leaves_out(&run(task, 0x1000, 2)));
        assert!(!images.leaves_out(&lazy(shared, 0x1000, 2)));
        images.pages(lazy(task, 0x1000, 1), &filled(1, 1)).unwrap();
        let late = |owner, vaddr| PageRun {
            flags: PageRun::LATE | LAZY,
            ..run(owner, vaddr, 1)
        };
        for wrong in [
            late(shared, 0x2000),
            lazy(task, 0x2000, 1),
            PageRun {
                flags: PageRun::LATE,
                ..run(task, 0x2000, 1)
            },
        ] {
            assert!(images.later(wrong).is_err(), "{wrong:?}");
        }
        images.later(late(task, 0x2000)).unwrap();
        images.pages(run(task, 0x3000, 1), &filled(1, 2)).unwrap();
        // Over the end of one mapping, a hole and the start of another.
        images.gap(gap(task, 0x4000, 8)).unwrap();
        images.pages(run(task, 0xc000, 1), &filled(1, 4)).unwrap();
        images.gap(gap(shared, 0x4000, 1)).unwrap();
        inventory(&mut images);
        let missing = images.fill(&mut from_store);
        assert!(
            matches!(missing, Err(CriuError::ImageData { .. })),
            "{missing:?}"
        );
        mm(
            &mut images,
            7,
            vec![plain(0x1000, 0x6000), plain(0x8000, 0xb000)],
        );
        let mut asked = Vec::new();
        images
            .fill(
                &mut |owner, vaddr, pages, out: &mut dyn io::Write| -> io::Result<()> {
                    asked.push((owner, vaddr, pages));
                    from_store(owner, vaddr, pages, out)
                },
            )
            .unwrap();
        assert_eq!(
            asked,
            [(task, 0x6000, 2), (task, 0xb000, 1), (shared, 0x4000, 1)]
        );
        let stats = images.finish().unwrap();
        assert_eq!(
            (stats.pages, stats.pages_in_gaps, stats.lazy_pages),
            (4, 9, 7)
        );
        assert_eq!(
            images.lazy_ranges(),
            [
                (task, 0x1000..0x3000),
                (task, 0x4000..0x6000),
                (task, 0x8000..0xb000)
            ]
        );
        let (_, entries) = decode(&fs::read(images.path().join("pagemap-7.img")).unwrap());
        let entries: Vec<_> = entries
            .iter()
            .map(|entry| (entry.vaddr, entry.nr_pages.unwrap(), entry.flags.unwrap()))
            .collect();
        assert_eq!(
            entries,
            [
                (0x1000, 2, 6),
                (0x3000, 1, 4),
                (0x4000, 2, 6),
                (0x6000, 2, 4),
                (0x8000, 3, 6),
                (0xb000, 2, 4)
            ]
        );
        let bytes = [0, 0, 2, 0, 0, stored(0x6000), stored(0x7000), 0, 0, 0];
        let bytes = [&bytes[..], &[stored(0xb000), 4]].concat();
        let expected: Vec<u8> = bytes.into_iter().flat_map(|byte| filled(1, byte)).collect();
        let pages = fs::read(images.path().join("pages-1.img")).unwrap();
        assert!(pages == expected);
    }

    /// Where a page of a mapping is missing that can wait, CRIU is not told; what cannot wait
    /// is where it was in the file.
    #[test]
    fn what_can_wait_is_one_run_over_its_holes() {
        let (_parent, mut images) = directory();
        images.lazy().unwrap();
        let task = PageOwner::Task(7);
        let lazy = |images: &mut ImageDir, vaddr, pages| {
            let run = PageRun {
                flags: PageRun::PRESENT | LAZY,
                ..run(task, vaddr, pages)
            };
            images.pages(run, &filled(pages, 1)).unwrap();
        };
        for (vaddr, pages) in [(0x1000, 1), (0x3000, 2), (0x8000, 1)] {
            lazy(&mut images, vaddr, pages);
        }
        // Side by side with the last mapping, and in none that can wait.
        lazy(&mut images, 0xa000, 1);
        images.pages(run(task, 0xc000, 1), &filled(1, 4)).unwrap();
        lazy(&mut images, 0xd000, 1);
        lazy(&mut images, 0xf000, 1);
        inventory(&mut images);
        let vmas = [0x1000..0xa000, 0xa000..0xb000, 0xd000..0x1_0000];
        let vmas = vmas.map(|range| plain(range.start, range.end));
        mm(&mut images, 7, vmas.to_vec());
        images.finish().unwrap();
        let ranges = [
            0x1000..0x2000,
            0x3000..0x5000,
            0x8000..0x9000,
            0xa000..0xb000,
            0xd000..0xe000,
            0xf000..0x1_0000,
        ];
        assert_eq!(images.lazy_ranges(), ranges.map(|range| (task, range)));
        let (_, entries) = decode(&fs::read(images.path().join("pagemap-7.img")).unwrap());
        let entries: Vec<_> = entries
            .iter()
            .map(|entry| (entry.vaddr, entry.nr_pages.unwrap(), entry.flags.unwrap()))
            .collect();
        assert_eq!(
            entries,
            [
                (0x1000, 4, 6),
                (0x5000, 4, 2),
                (0xa000, 1, 6),
                (0xc000, 1, 4),
                (0xd000, 2, 6),
                (0xf000, 1, 2),
            ]
        );
        let bytes = [0, 0, 0, 0, 0, 4, 0, 0];
        let expected: Vec<u8> = bytes.into_iter().flat_map(|byte| filled(1, byte)).collect();
        let pages = fs::read(images.path().join("pages-1.img")).unwrap();
        assert!(pages == expected);
    }

    #[test]
    fn what_a_relative_has_locked_does_not_wait() {
        let (_parent, mut images) = directory();
        images.lazy().unwrap();
        let child = PageOwner::Task(8);
        images.gap(gap(child, 0x1000, 4)).unwrap();
        inventory(&mut images);
        let locked = |start, end| mapping(start, end, 0x2022, 1 << 9 | 1);
        mm(&mut images, 7, vec![locked(0x2000, 0x3000)]);
        mm(
            &mut images,
            8,
            vec![
                plain(0x1000, 0x2000),
                plain(0x2000, 0x3000),
                plain(0x3000, 0x5000),
            ],
        );
        let mut asked = Vec::new();
        images
            .fill(
                &mut |owner, vaddr, pages, out: &mut dyn io::Write| -> io::Result<()> {
                    asked.push((owner, vaddr, pages));
                    from_store(owner, vaddr, pages, out)
                },
            )
            .unwrap();
        assert_eq!(asked, [(child, 0x2000, 1)]);
        images.finish().unwrap();
        assert_eq!(
            images.lazy_ranges(),
            [(child, 0x1000..0x2000), (child, 0x3000..0x5000)]
        );
    }

    #[test]
    fn what_children_find_wiped_does_not_wait() {
        let (_parent, mut images) = directory();
        images.lazy().unwrap();
        let task = PageOwner::Task(7);
        let fresh = PageRun {
            flags: PageRun::PRESENT | LAZY,
            ..run(task, 0x1000, 6)
        };
        images.pages(fresh, &filled(6, 1)).unwrap();
        images.gap(gap(task, 0x8000, 3)).unwrap();
        inventory(&mut images);
        let wiped = |start, end| VmaEntry {
            // With `MADV_DONTDUMP`.
            advice: Some(1 << 16 | 1 << 18),
            ..plain(start, end)
        };
        let mappings = vec![
            plain(0x1000, 0x3000),
            wiped(0x3000, 0x5000),
            plain(0x5000, 0x9000),
            wiped(0x9000, 0xa000),
            plain(0xa000, 0xb000),
        ];
        mm(&mut images, 7, mappings);
        images.fill(&mut from_store).unwrap();
        let stats = images.finish().unwrap();
        assert_eq!(
            (stats.pages, stats.pages_in_gaps, stats.lazy_pages),
            (6, 3, 6)
        );
        assert_eq!(
            images.lazy_ranges(),
            [
                (task, 0x1000..0x3000),
                (task, 0x5000..0x7000),
                (task, 0x8000..0x9000),
                (task, 0xa000..0xb000)
            ]
        );
        let bytes = [0, 0, stored(0x3000), stored(0x4000), 0, 0];
        let bytes = [&bytes[..], &[0, stored(0x9000), 0]].concat();
        let expected: Vec<u8> = bytes.into_iter().flat_map(|byte| filled(1, byte)).collect();
        let pages = fs::read(images.path().join("pages-1.img")).unwrap();
        assert!(pages == expected);
    }

    #[test]
    fn only_plain_anonymous_memory_can_wait() {
        let special = [
            mapping(0, 1, 0x02, 1 << 6 | 1),
            mapping(0, 1, 0x21, 1 << 8 | 1),
            mapping(0, 1, 0x22 | 0x2000, 1 << 9 | 1),
            mapping(0, 1, 0x22 | 0x40000, 1 << 9 | 1),
            mapping(0, 1, 0x22, 1 << 9 | 1 << 3 | 1),
            mapping(0, 1, 0x22, 1 << 9 | 1 << 1 | 1),
            mapping(0, 1, 0x22, 1 << 9 | 1 << 12 | 1),
            mapping(0, 1, 0x22, 1 << 9),
        ];
        for vma in special {
            assert!(!vma.can_be_lazy(), "{vma:?}");
        }
        assert!(plain(0, 1).can_be_lazy());
        // A heap.
        assert!(mapping(0, 1, 0x22, 1 << 9 | 1 << 5 | 1).can_be_lazy());
        let (_parent, mut images) = directory();
        images
            .pages(run(PageOwner::Task(7), 0x1000, 1), &filled(1, 1))
            .unwrap();
        assert!(images.lazy().is_err(), "too late");
        assert!(images.lazy_ranges().is_empty());
    }

    #[test]
    fn the_inventory_of_an_earlier_dump() {
        // From `images/inventory.proto`: img_version 0, dump_uptime 300.
        let expected = [
            0x16, 0x31, 0x31, 0x58, 5, 0, 0, 0, 0x08, 0, 0x40, 0xac, 0x02,
        ];
        assert_eq!(uptime_inventory(300), expected);
    }

    #[test]
    fn images_are_complete_or_refused() {
        let (_parent, mut images) = directory();
        let piece = |name, last| ImagePiece {
            name,
            last,
            data: b"x",
        };
        for name in ["pages-1.img", "pagemap-7.img", "../x.img", "core"] {
            assert!(images.image_piece(&piece(name, true)).is_err(), "{name}");
        }
        assert!(images.finish().is_err(), "without an inventory");
        images.image_piece(&piece("core-7.img", false)).unwrap();
        inventory(&mut images);
        assert!(images.finish().is_err(), "with half an image");
        images.image_piece(&piece("core-7.img", true)).unwrap();
        assert!(images.image_piece(&piece("core-7.img", true)).is_err());
        let stats = images.finish().unwrap();
        assert_eq!((stats.images, stats.image_bytes), (2, 3));
        assert!(images.finish().is_err(), "twice");

        let small = small_images(images.path()).unwrap();
        let names: Vec<&str> = small.iter().map(|image| image.name.as_str()).collect();
        assert_eq!(names, ["core-7.img", "inventory.img"]);
    }

    #[test]
    fn a_disk_is_refused_and_left_clean() {
        let parent = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = parent.path().join("images");
        match ImageDir::create(&path) {
            Err(error @ CriuError::NotTmpfs { .. }) => {
                assert!(error.help().unwrap().contains("/dev/shm"));
                assert!(!path.exists());
            }
            Ok(_) => println!("SKIP disk: /var/tmp is a tmpfs here"),
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn a_full_tmpfs_is_told_apart() {
        let parent = tempfile::tempdir().unwrap();
        let target = std::ffi::CString::new(parent.path().to_str().unwrap()).unwrap();
        // SAFETY: all pointers are C strings that outlive the call.
        let mounted = unsafe {
            libc::mount(
                c"tmpfs".as_ptr(),
                target.as_ptr(),
                c"tmpfs".as_ptr(),
                0,
                c"size=64k".as_ptr().cast(),
            )
        };
        if mounted != 0 {
            println!("SKIP mount: {}", io::Error::last_os_error());
            return;
        }
        let mut images = ImageDir::create(parent.path().join("images")).unwrap();
        let result = images.pages(run(PageOwner::Task(7), 0x1000, 64), &filled(64, 1));
        drop(images);
        // SAFETY: as above.
        let unmounted = unsafe { libc::umount2(target.as_ptr(), 0) };
        assert_eq!(
            unmounted, 0,
            "the directory was removed and nothing is open"
        );
        let error = result.unwrap_err();
        assert!(matches!(error, CriuError::ImageSpace { .. }), "{error}");
        assert!(error.help().unwrap().contains("tmpfs"));
    }

    #[test]
    fn dropping_and_wiping_remove_everything() {
        let (parent, mut images) = directory();
        let path = images.path().to_owned();
        assert_eq!(
            std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions())
                & 0o777,
            0o700
        );
        inventory(&mut images);
        drop(images);
        assert!(!path.exists());
        let images = ImageDir::create(&path).unwrap();
        assert!(ImageDir::create(&path).is_err(), "it exists");
        images.wipe().unwrap();
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    proptest! {
        /// What is written says the same as what came, however it was cut.
        #[test]
        fn runs_survive(cuts in prop::collection::vec((0u64..3, 1u64..4, any::<bool>(), any::<u8>(), any::<bool>()), 1..40)) {
            let (_parent, mut images) = directory();
            let mut at = [0x1000u64, 0];
            let mut expected: [Vec<(u64, u8)>; 2] = [Vec::new(), Vec::new()];
            for (distance, pages, shared, byte, known) in cuts {
                let which = usize::from(shared);
                let owner = if shared { PageOwner::Shared(3) } else { PageOwner::Task(3) };
                let vaddr = at[which] + distance * PAGE_BYTES as u64;
                if known {
                    images.gap(gap(owner, vaddr, pages)).unwrap();
                } else {
                    images.pages(run(owner, vaddr, pages), &filled(pages, byte)).unwrap();
                }
                for page in 0..pages {
                    let vaddr = vaddr + page * PAGE_BYTES as u64;
                    expected[which].push((vaddr, if known { stored(vaddr) } else { byte }));
                }
                at[which] = vaddr + pages * PAGE_BYTES as u64;
            }
            inventory(&mut images);
            images.fill(&mut from_store).unwrap();
            images.finish().unwrap();
            for (name, expected) in ["pagemap-3.img", "pagemap-shmem-3.img"].iter().zip(expected) {
                let path = images.path().join(name);
                if expected.is_empty() {
                    prop_assert!(!path.exists());
                    continue;
                }
                let (head, entries) = decode(&fs::read(path).unwrap());
                let data = fs::read(images.path().join(format!("pages-{}.img", head.pages_id))).unwrap();
                let mut found = Vec::new();
                let mut previous_end = None;
                for entry in entries {
                    let pages = entry.nr_pages.unwrap();
                    prop_assert_eq!(u64::from(entry.compat_nr_pages), pages);
                    // Adjacent runs were merged.
                    prop_assert!(previous_end.is_none_or(|end| end < entry.vaddr));
                    for page in 0..pages {
                        let byte = data[found.len() * PAGE_BYTES];
                        found.push((entry.vaddr + page * PAGE_BYTES as u64, byte));
                    }
                    previous_end = Some(entry.vaddr + pages * PAGE_BYTES as u64);
                }
                prop_assert_eq!(data.len(), found.len() * PAGE_BYTES);
                prop_assert_eq!(found, expected);
            }
        }
    }
}
