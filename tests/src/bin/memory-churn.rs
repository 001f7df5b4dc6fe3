//! A process tree that takes its memory apart without end, and knows what every
//! byte of it has to be.
//!
//! `memory-churn serve ADDRESS SEED REPORT` maps, moves, shrinks, gives back,
//! protects and forks at random. A connection may ask `?` how far it is, and
//! `.` for a last check of everything; each answer is a line, and one that
//! starts with `wrong` says what is not as it must be. After `c` the tree does
//! nothing that the kernel keeps from those who watch its memory: guard pages
//! and memory that children shall find wiped stay as they are, until `w`.
//! Children do the same for a while; one that finds something wrong writes it
//! to a file beside REPORT. `memory-churn child SEED STEPS REPORT` is what some
//! children execute; it is calm from the start.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::ffi::OsStrExt as _;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::{env, fs, ptr, thread};

const PAGE: usize = 4096;
/// What one process maps at most, in pages.
const PAGES_MAX: usize = 4096;
/// More parts than this are thinned out.
const REGIONS_MAX: usize = 160;
/// Living children of one process.
const CHILDREN_MAX: usize = 3;
/// Pages of the shared memory that belong to one process.
const SLOT_PAGES: usize = 8;
/// Processes that have had such pages at one time.
const SLOTS: usize = 24;
/// Pages of this program's file that are mapped privately.
const FILE_PAGES: usize = 32;
/// Everything is checked after so many steps, not only what is touched.
const CHECK_EVERY: u64 = 400;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match *words {
        ["serve", address, seed, report] => serve(address, seed, report),
        ["child", seed, steps, report] => child(seed, steps, report),
        _ => Err("usage: memory-churn serve ADDRESS SEED REPORT".to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("memory-churn: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(address: &str, seed: &str, report: &str) -> Result<(), String> {
    let listener = TcpListener::bind(address).map_err(text)?;
    listener.set_nonblocking(true).map_err(text)?;
    let mut peers: Vec<TcpStream> = Vec::new();
    let mut churn = Churn::new(number(seed)?, report)?;
    let mut wrong = None;
    loop {
        if let Ok((peer, _)) = listener.accept() {
            peer.set_nonblocking(true).map_err(text)?;
            churn.in_child_close(&peer);
            peers.push(peer);
        }
        churn.in_child_close(&listener);
        for peer in &mut peers {
            let mut question = [0];
            let Ok(1) = peer.read(&mut question) else {
                continue;
            };
            let last = question == *b".";
            match question {
                [b'c'] => churn.shared.set_calm(true),
                [b'w'] => churn.shared.set_calm(false),
                _ => {}
            }
            if last && wrong.is_none() {
                wrong = churn.finish().err();
            }
            let answer = match &wrong {
                Some(wrong) => format!("wrong: {wrong}\n"),
                None => format!("steps {} forks {}\n", churn.steps, churn.forks),
            };
            peer.write_all(answer.as_bytes()).map_err(text)?;
            if last {
                return Ok(());
            }
        }
        if wrong.is_none() {
            wrong = churn.step().err();
        } else {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A child that has executed this program anew.
fn child(seed: &str, steps: &str, report: &str) -> Result<(), String> {
    let mut churn = Churn::new(number(seed)?, report)?;
    churn.depth = DEPTH_MAX;
    churn.shared.set_calm(true);
    let steps = number(steps)?;
    let done = (0..steps)
        .try_for_each(|_| churn.step())
        .and_then(|()| churn.finish());
    done.inspect_err(|wrong| churn.report(wrong))
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("{text} is no number"))
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn text(error: io::Error) -> String {
    error.to_string()
}

/// What a page has to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Zero,
    /// The pattern of a number.
    Pattern(u64),
    /// That, or zeros: the kernel may take it at any time (`MADV_FREE`).
    Freed(u64),
    /// A page of this program's file.
    File(usize),
    /// Nothing that may be touched (`MADV_GUARD_INSTALL`).
    Guard,
}

/// What a child gets of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnFork {
    Copy,
    Wipe,
    Drop,
}

/// Memory of one kind, side by side.
#[derive(Clone, Debug)]
struct Region {
    at: usize,
    pages: Vec<Content>,
    /// First page of the file; `None` for anonymous memory.
    file: Option<usize>,
    protection: i32,
    on_fork: OnFork,
    locked: bool,
}

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn word(pattern: u64, index: usize) -> u64 {
    (pattern << 16 | (index as u64) << 1 | 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn fill(at: usize, pattern: u64) {
    for index in 0..PAGE / 8 {
        // SAFETY: the caller names a page of a writable mapping of ours.
        unsafe { (at as *mut u64).add(index).write(word(pattern, index)) };
    }
}

fn page_at(at: usize) -> Vec<u64> {
    let mut page = vec![0; PAGE / 8];
    // SAFETY: the caller names a page of a readable mapping of ours.
    unsafe { ptr::copy_nonoverlapping(at as *const u64, page.as_mut_ptr(), PAGE / 8) };
    page
}

fn is_pattern(page: &[u64], pattern: u64) -> bool {
    page.iter()
        .enumerate()
        .all(|(index, &found)| found == word(pattern, index))
}

/// What went wrong at the call before.
fn called(what: &str, failed: bool) -> Result<(), String> {
    if failed {
        return Err(format!("{what}: {}", io::Error::last_os_error()));
    }
    Ok(())
}

fn map(hint: usize, pages: usize, flags: i32) -> Result<usize, String> {
    // SAFETY: a new mapping where nothing is, or where the kernel likes.
    let at = unsafe {
        libc::mmap(
            hint as *mut libc::c_void,
            pages * PAGE,
            READ_WRITE,
            libc::MAP_ANONYMOUS | flags,
            -1,
            0,
        )
    };
    called("mmap", at == libc::MAP_FAILED)?;
    Ok(at.addr())
}

/// Memory shared by the whole tree: a number, then the pages of each process.
#[derive(Clone, Copy)]
struct Shared {
    at: usize,
}

impl Shared {
    fn new() -> Result<Self, String> {
        let at = map(0, 1 + SLOTS * SLOT_PAGES, libc::MAP_SHARED)?;
        Ok(Self { at })
    }

    /// Counts for the whole tree.
    fn next(self) -> u64 {
        // SAFETY: the first page of the mapping, which stays for good, is used
        // by these atomics only.
        let counter = unsafe { AtomicU64::from_ptr(self.at as *mut u64) };
        counter.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn calm(self) -> &'static AtomicU64 {
        // SAFETY: the second number of that page; as above.
        unsafe { AtomicU64::from_ptr((self.at as *mut u64).add(1)) }
    }

    fn set_calm(self, calm: bool) {
        self.calm().store(calm.into(), Ordering::Relaxed);
    }

    fn is_calm(self) -> bool {
        self.calm().load(Ordering::Relaxed) != 0
    }

    fn page(self, slot: usize, page: usize) -> usize {
        self.at + (1 + slot * SLOT_PAGES + page) * PAGE
    }
}

/// How deep children fork.
const DEPTH_MAX: u32 = 2;

struct Churn {
    regions: Vec<Region>,
    /// Where something was mapped, to map there again.
    holes: Vec<usize>,
    random: u64,
    shared: Shared,
    slot: usize,
    slot_content: [Content; SLOT_PAGES],
    /// Children and their slots.
    forked: Vec<(i32, usize)>,
    executed: Vec<Child>,
    descriptors: Vec<i32>,
    file: fs::File,
    file_pages: Vec<u64>,
    report: String,
    depth: u32,
    guards: bool,
    steps: u64,
    forks: u64,
}

impl Churn {
    fn new(seed: u64, report: &str) -> Result<Self, String> {
        let program = env::current_exe().map_err(text)?;
        let bytes = fs::read(&program).map_err(text)?;
        let file_pages = bytes[..FILE_PAGES * PAGE]
            .chunks_exact(8)
            .map(|word| u64::from_ne_bytes(word.try_into().unwrap_or_default()))
            .collect();
        let mut churn = Self {
            regions: Vec::new(),
            holes: Vec::new(),
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            shared: Shared::new()?,
            slot: 0,
            slot_content: [Content::Zero; SLOT_PAGES],
            forked: Vec::new(),
            executed: Vec::new(),
            descriptors: Vec::new(),
            file: fs::File::open(program).map_err(text)?,
            file_pages,
            report: report.to_owned(),
            depth: 0,
            guards: true,
            steps: 0,
            forks: 0,
        };
        for _ in 0..12 {
            churn.map_some()?;
        }
        Ok(churn)
    }

    /// A descriptor that children are not to keep.
    fn in_child_close(&mut self, descriptor: &impl std::os::fd::AsRawFd) {
        let fd = descriptor.as_raw_fd();
        if !self.descriptors.contains(&fd) {
            self.descriptors.push(fd);
        }
    }

    fn random(&mut self, below: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        usize::try_from((self.random >> 11) % below.max(1) as u64).unwrap_or(0)
    }

    fn report(&self, wrong: &str) {
        let path = format!("{}.{}", self.report, std::process::id());
        // Whoever waits for this process sees its exit code as well.
        let _ = fs::write(path, wrong);
    }

    fn step(&mut self) -> Result<(), String> {
        self.steps += 1;
        let choice = self.random(200);
        let done = self.one(choice);
        done.map_err(|error| format!("step {} ({choice}): {error}", self.steps))?;
        if self.steps.is_multiple_of(CHECK_EVERY) {
            self.check()
                .map_err(|error| format!("after step {}: {error}", self.steps))?;
            self.reap(false)?;
        }
        // The rounds and the other hosts on this machine need time, too.
        if self.steps.is_multiple_of(4) {
            thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    fn one(&mut self, choice: usize) -> Result<(), String> {
        match choice {
            0..6 => return self.fork(),
            6..7 => return self.execute(),
            7..12 => return self.deep(0),
            12..24 => return self.share(),
            24..40 => return self.map_some(),
            _ => {}
        }
        if self.regions.is_empty() {
            return self.map_some();
        }
        let mut part = self.cut();
        let kept = self.change(choice, &mut part);
        match kept {
            Ok(true) => self.regions.push(part),
            Ok(false) => self.holes.push(part.at),
            Err(error) => return Err(format!("{error}, in {:#x}", part.at)),
        }
        if self.holes.len() > 16 {
            self.holes.remove(0);
        }
        if self.regions.len() > REGIONS_MAX {
            let index = self.random(self.regions.len());
            let region = self.regions.swap_remove(index);
            unmap(&region)?;
        }
        Ok(())
    }

    /// `false` when the part is not there any more.
    fn change(&mut self, choice: usize, part: &mut Region) -> Result<bool, String> {
        match choice {
            40..70 => self.check_region(part)?,
            70..105 => self.write(part)?,
            105..118 => {
                self.check_region(part)?;
                unmap(part)?;
                return Ok(false);
            }
            118..132 => self.move_away(part)?,
            132..140 => self.resize(part)?,
            140..154 => self.give_back(part)?,
            154..164 => self.free(part)?,
            164..176 => self.protect(part)?,
            176..182 => self.advise(part)?,
            182..187 => self.on_fork(part)?,
            // CRIU cannot bring guard pages back into locked memory.
            187..192 if part.pages.contains(&Content::Guard) => self.check_region(part)?,
            187..192 => {
                // SAFETY: memory of ours, of which only the place changes.
                let failed = unsafe {
                    match part.locked {
                        true => libc::munlock(part.at as *const _, part.bytes()),
                        false => libc::mlock(part.at as *const _, part.bytes()),
                    }
                };
                // Pages that may not be touched cannot be locked in, others are.
                if failed == 0 || !part.locked {
                    part.locked = failed == 0 && !part.locked;
                }
                if failed != 0 {
                    // SAFETY: as above.
                    unsafe { libc::munlock(part.at as *const _, part.bytes()) };
                }
            }
            _ => self.guard(part)?,
        }
        Ok(true)
    }

    /// Maps something of a random kind at a random place.
    fn map_some(&mut self) -> Result<(), String> {
        let mapped: usize = self.regions.iter().map(|region| region.pages.len()).sum();
        if mapped > PAGES_MAX {
            return Ok(());
        }
        if self.random(8) == 0 {
            return self.map_file();
        }
        let pages = 1 + match self.random(4) {
            0 => self.random(700),
            _ => self.random(90),
        };
        let populate = if self.random(6) == 0 {
            libc::MAP_POPULATE
        } else {
            0
        };
        let flags = libc::MAP_PRIVATE | populate;
        // Where something else was before, as far as there is room.
        let again = match self.holes.len() {
            0 => None,
            holes if self.random(2) == 0 => {
                let index = self.random(holes);
                Some(self.holes.swap_remove(index))
            }
            _ => None,
        };
        let placed =
            again.and_then(|hole| map(hole, pages, flags | libc::MAP_FIXED_NOREPLACE).ok());
        let at = match placed {
            Some(at) => at,
            None => map(0, pages, flags)?,
        };
        let mut region = Region {
            at,
            pages: vec![Content::Zero; pages],
            file: None,
            protection: READ_WRITE,
            on_fork: OnFork::Copy,
            locked: false,
        };
        for page in 0..pages {
            // Some stay untouched, some hold zeros that were written.
            match self.random(8) {
                0 => {}
                1 => {
                    // SAFETY: a page of the mapping just made.
                    unsafe { ((at + page * PAGE) as *mut u64).write_volatile(0) };
                }
                _ => self.set(&mut region, page),
            }
        }
        self.regions.push(region);
        Ok(())
    }

    fn map_file(&mut self) -> Result<(), String> {
        use std::os::fd::AsRawFd as _;
        let first = self.random(FILE_PAGES);
        let pages = 1 + self.random(FILE_PAGES - first);
        // SAFETY: a new private mapping; the file does not change.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                pages * PAGE,
                READ_WRITE,
                libc::MAP_PRIVATE,
                self.file.as_raw_fd(),
                libc::off_t::try_from(first * PAGE).unwrap_or(0),
            )
        };
        called("mmap of a file", at == libc::MAP_FAILED)?;
        self.regions.push(Region {
            at: at.addr(),
            pages: (first..first + pages).map(Content::File).collect(),
            file: Some(first),
            protection: READ_WRITE,
            on_fork: OnFork::Copy,
            locked: false,
        });
        Ok(())
    }

    /// A part of a region, cut out of it as a region of its own.
    fn cut(&mut self) -> Region {
        let index = self.random(self.regions.len());
        let region = self.regions.swap_remove(index);
        if self.random(5) == 0 {
            return region;
        }
        let start = self.random(region.pages.len());
        let count = 1 + self.random((region.pages.len() - start).min(100));
        let end = (start + count).min(region.pages.len());
        for rest in [region.part(0, start), region.part(end, region.pages.len())] {
            if !rest.pages.is_empty() {
                self.regions.push(rest);
            }
        }
        region.part(start, end)
    }

    fn set(&mut self, region: &mut Region, page: usize) {
        let pattern = self.shared.next();
        fill(region.at + page * PAGE, pattern);
        region.pages[page] = Content::Pattern(pattern);
    }

    fn check_page(&self, at: usize, content: &mut Content) -> Result<(), String> {
        let page = match *content {
            Content::Guard => return Ok(()),
            _ => page_at(at),
        };
        let is_zero = page.iter().all(|&word| word == 0);
        let right = match *content {
            Content::Zero => is_zero,
            Content::Pattern(pattern) => is_pattern(&page, pattern),
            Content::Freed(_) if is_zero => {
                *content = Content::Zero;
                true
            }
            Content::Freed(pattern) => is_pattern(&page, pattern),
            Content::File(number) => {
                let words = PAGE / 8;
                page == self.file_pages[number * words..(number + 1) * words]
            }
            Content::Guard => true,
        };
        if right {
            return Ok(());
        }
        let is = match &page[..] {
            _ if is_zero => "zeros".to_owned(),
            words => {
                // What pattern it would be, by its first word.
                let odd = words[0].wrapping_mul(0xf1de_83e1_9937_733d);
                let number = odd >> 16;
                let whole = is_pattern(words, number);
                format!("{:#x}: pattern {number}, whole: {whole}", words[0])
            }
        };
        Err(format!("page {at:#x} has {is} in place of {content:?}"))
    }

    fn check_region(&self, region: &mut Region) -> Result<(), String> {
        let hidden = region.protection & libc::PROT_READ == 0;
        if hidden {
            protect(region, libc::PROT_READ)?;
        }
        for page in 0..region.pages.len() {
            let at = region.at + page * PAGE;
            self.check_page(at, &mut region.pages[page])
                .map_err(|error| {
                    format!(
                        "{error} (file {:?}, protection {}, {:?}, locked {})",
                        region.file, region.protection, region.on_fork, region.locked
                    )
                })?;
        }
        if hidden {
            protect(region, region.protection)?;
        }
        Ok(())
    }

    fn check(&mut self) -> Result<(), String> {
        let mut regions = std::mem::take(&mut self.regions);
        let done = regions
            .iter_mut()
            .try_for_each(|region| self.check_region(region));
        self.regions = regions;
        done?;
        for page in 0..SLOT_PAGES {
            let mut content = self.slot_content[page];
            self.check_page(self.shared.page(self.slot, page), &mut content)
                .map_err(|error| format!("shared memory: {error}"))?;
        }
        Ok(())
    }

    fn write(&mut self, part: &mut Region) -> Result<(), String> {
        if part.protection != READ_WRITE {
            return self.check_region(part);
        }
        let every = 1 + self.random(4);
        for page in (0..part.pages.len()).step_by(every).take(24) {
            if part.pages[page] == Content::Guard {
                continue;
            }
            self.check_page(part.at + page * PAGE, &mut part.pages[page])?;
            self.set(part, page);
        }
        Ok(())
    }

    /// To another address, at once or, where the kernel does not do that with
    /// several mappings, page by page.
    fn move_away(&mut self, part: &mut Region) -> Result<(), String> {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let to = map(0, part.pages.len(), libc::MAP_PRIVATE)?;
        let moved = |from: usize, bytes: usize, to: usize| {
            // SAFETY: memory of ours goes to a place reserved for it.
            let at = unsafe { libc::mremap(from as *mut _, bytes, bytes, flags, to) };
            at != libc::MAP_FAILED
        };
        if !moved(part.at, part.bytes(), to) {
            for page in 0..part.pages.len() {
                let step = page * PAGE;
                if !moved(part.at + step, PAGE, to + step) && page + 1 == part.pages.len() {
                    // The part that moved at first is at its new place already.
                    return called("mremap", true);
                }
            }
        }
        self.holes.push(part.at);
        part.at = to;
        Ok(())
    }

    /// Grows to another place, or gives its end away.
    fn resize(&mut self, part: &mut Region) -> Result<(), String> {
        let pages = part.pages.len();
        let new = match self.random(2) {
            0 => 1 + self.random(pages),
            _ if part.file.is_some() => pages,
            _ => pages + 1 + self.random(40),
        };
        // SAFETY: memory of ours, to which nothing else refers.
        let at = unsafe {
            libc::mremap(
                part.at as *mut _,
                part.bytes(),
                new * PAGE,
                libc::MREMAP_MAYMOVE,
            )
        };
        if at == libc::MAP_FAILED {
            // Several mappings cannot grow at once, and locked ones only so far.
            return Ok(());
        }
        part.at = at.addr();
        part.pages.resize(new, Content::Zero);
        Ok(())
    }

    fn give_back(&mut self, part: &mut Region) -> Result<(), String> {
        if part.locked {
            return self.check_region(part);
        }
        madvise(part, libc::MADV_DONTNEED)?;
        for (page, content) in part.pages.iter_mut().enumerate() {
            if *content != Content::Guard {
                *content = part
                    .file
                    .map_or(Content::Zero, |first| Content::File(first + page));
            }
        }
        Ok(())
    }

    fn free(&mut self, part: &mut Region) -> Result<(), String> {
        if part.locked || part.file.is_some() {
            return self.check_region(part);
        }
        madvise(part, libc::MADV_FREE)?;
        for content in &mut part.pages {
            if let Content::Pattern(pattern) = *content {
                *content = Content::Freed(pattern);
            }
        }
        if self.random(3) == 0 {
            // Takes them at once, where the kernel sees fit.
            let _ = madvise(part, libc::MADV_PAGEOUT);
        }
        Ok(())
    }

    fn protect(&mut self, part: &mut Region) -> Result<(), String> {
        self.check_region(part)?;
        // Executable memory that begins with a guard page is refused: CRIU
        // looks there for a vDSO and brings the process down.
        let guarded = part.pages.contains(&Content::Guard);
        part.protection = match self.random(5) {
            0 => libc::PROT_NONE,
            1 => libc::PROT_READ,
            2 if part.file.is_none() && !guarded => libc::PROT_READ | libc::PROT_EXEC,
            _ => READ_WRITE,
        };
        protect(part, part.protection)
    }

    /// What changes the place of pages and not their content.
    fn advise(&mut self, part: &mut Region) -> Result<(), String> {
        const MADV_COLLAPSE: i32 = 25;
        let advice = match self.random(5) {
            0 => libc::MADV_HUGEPAGE,
            1 => libc::MADV_NOHUGEPAGE,
            2 => MADV_COLLAPSE,
            3 => libc::MADV_PAGEOUT,
            _ => libc::MADV_COLD,
        };
        // Refused where it does not fit, which changes nothing either.
        let _ = madvise(part, advice);
        self.check_region(part)
    }

    fn on_fork(&mut self, part: &mut Region) -> Result<(), String> {
        if part.file.is_some() || self.shared.is_calm() {
            return Ok(());
        }
        for (wanted, undo) in [(libc::MADV_DOFORK, true), (libc::MADV_KEEPONFORK, true)] {
            if undo {
                madvise(part, wanted)?;
            }
        }
        part.on_fork = match self.random(3) {
            0 => OnFork::Copy,
            1 => OnFork::Wipe,
            _ => OnFork::Drop,
        };
        match part.on_fork {
            OnFork::Copy => Ok(()),
            OnFork::Wipe => madvise(part, libc::MADV_WIPEONFORK),
            OnFork::Drop => madvise(part, libc::MADV_DONTFORK),
        }
    }

    /// Guard pages, and their end.
    fn guard(&mut self, part: &mut Region) -> Result<(), String> {
        const MADV_GUARD_INSTALL: i32 = 102;
        const MADV_GUARD_REMOVE: i32 = 103;
        let executable = part.protection & libc::PROT_EXEC != 0;
        if !self.guards || part.locked || part.file.is_some() || executable {
            return self.check_region(part);
        }
        let install = self.random(2) == 0 && !self.shared.is_calm();
        let advice = if install {
            MADV_GUARD_INSTALL
        } else {
            MADV_GUARD_REMOVE
        };
        if madvise(part, advice).is_err() {
            // Not with this kernel.
            self.guards = false;
            return Ok(());
        }
        for content in &mut part.pages {
            match install {
                true => *content = Content::Guard,
                false if *content == Content::Guard => *content = Content::Zero,
                false => {}
            }
        }
        Ok(())
    }

    /// The stack grows, and is as it was.
    fn deep(&mut self, depth: usize) -> Result<(), String> {
        let numbers: [u64; 512] = std::array::from_fn(|index| word(depth as u64, index));
        let kept = std::hint::black_box(numbers);
        if depth < 60 && self.random(20) > 0 {
            self.deep(depth + 1)?;
        }
        let right = is_pattern(&kept, depth as u64);
        right
            .then_some(())
            .ok_or_else(|| format!("stack at depth {depth}"))
    }

    /// Writes, checks, drops pages of the memory that the tree shares.
    fn share(&mut self) -> Result<(), String> {
        let page = self.random(SLOT_PAGES);
        let at = self.shared.page(self.slot, page);
        let mut content = self.slot_content[page];
        self.check_page(at, &mut content)
            .map_err(|error| format!("shared memory: {error}"))?;
        let advice = match self.random(6) {
            // Drops it from this process only.
            0 => libc::MADV_DONTNEED,
            // Drops it for all.
            1 => libc::MADV_REMOVE,
            _ => {
                let pattern = self.shared.next();
                fill(at, pattern);
                self.slot_content[page] = Content::Pattern(pattern);
                return Ok(());
            }
        };
        // SAFETY: memory of ours.
        let failed = unsafe { libc::madvise(at as *mut _, PAGE, advice) } != 0;
        called("madvise of shared memory", failed)?;
        if advice == libc::MADV_REMOVE {
            self.slot_content[page] = Content::Zero;
        }
        Ok(())
    }

    fn fork(&mut self) -> Result<(), String> {
        self.reap(false)?;
        let children = self.forked.len() + self.executed.len();
        if children >= CHILDREN_MAX || self.depth >= DEPTH_MAX {
            return Ok(());
        }
        // The upper ones fork further, so they leave slots in between.
        let taken: Vec<usize> = self.forked.iter().map(|&(_, slot)| slot).collect();
        let stride = if self.depth == 0 { CHILDREN_MAX + 1 } else { 1 };
        let free = (1..=CHILDREN_MAX)
            .map(|index| self.slot + index * stride)
            .find(|slot| !taken.contains(slot) && *slot < SLOTS);
        let Some(slot) = free else {
            return Ok(());
        };
        self.forks += 1;
        let seed = self.random(usize::MAX / 2) as u64;
        // SAFETY: this process has one thread.
        let pid = unsafe { libc::fork() };
        called("fork", pid == -1)?;
        if pid == 0 {
            let done = self.as_child(seed, slot);
            if let Err(wrong) = &done {
                self.report(wrong);
            }
            // SAFETY: what the parent has open stays untouched.
            unsafe { libc::_exit(i32::from(done.is_err())) };
        }
        self.forked.push((pid, slot));
        Ok(())
    }

    fn as_child(&mut self, seed: u64, slot: usize) -> Result<(), String> {
        for fd in self.descriptors.drain(..) {
            // SAFETY: the parent's descriptors, which this process does not use.
            unsafe { libc::close(fd) };
        }
        self.depth += 1;
        self.random = seed | 1;
        self.forked.clear();
        self.executed.drain(..).for_each(std::mem::forget);
        self.slot = slot;
        for page in 0..SLOT_PAGES {
            let pattern = self.shared.next();
            fill(self.shared.page(slot, page), pattern);
            self.slot_content[page] = Content::Pattern(pattern);
        }
        self.regions.retain(|region| region.on_fork != OnFork::Drop);
        for region in &mut self.regions {
            region.locked = false;
            if region.on_fork == OnFork::Wipe {
                for content in &mut region.pages {
                    if *content != Content::Guard {
                        *content = Content::Zero;
                    }
                }
            }
        }
        let steps = 100 + self.random(2500);
        (0..steps).try_for_each(|_| self.step())?;
        self.finish()
    }

    /// A child that executes this program.
    fn execute(&mut self) -> Result<(), String> {
        if self.depth > 0 || self.executed.len() + self.forked.len() >= CHILDREN_MAX {
            return Ok(());
        }
        self.forks += 1;
        let (seed, steps) = (self.random(1 << 30), 100 + self.random(1500));
        let child = Command::new(env::current_exe().map_err(text)?)
            .args(["child", &seed.to_string(), &steps.to_string()])
            .arg(std::ffi::OsStr::from_bytes(self.report.as_bytes()))
            .stdin(Stdio::null())
            .spawn()
            .map_err(text)?;
        self.executed.push(child);
        Ok(())
    }

    fn reap(&mut self, wait: bool) -> Result<(), String> {
        let mut ended = Vec::new();
        for &(pid, slot) in &self.forked {
            let mut status = 0;
            let how = if wait { 0 } else { libc::WNOHANG };
            // SAFETY: room for a status.
            let found = unsafe { libc::waitpid(pid, &raw mut status, how) };
            called("waitpid", found == -1)?;
            if found == 0 {
                continue;
            }
            if status != 0 {
                return Err(format!("child {pid} (slot {slot}) ended with {status:#x}"));
            }
            ended.push(pid);
        }
        self.forked.retain(|(pid, _)| !ended.contains(pid));
        let mut running = Vec::new();
        for mut child in self.executed.drain(..) {
            let status = if wait {
                child.wait().map(Some)
            } else {
                child.try_wait()
            };
            match status.map_err(text)? {
                None => running.push(child),
                Some(status) if status.success() => {}
                Some(status) => return Err(format!("executed child: {status}")),
            }
        }
        self.executed = running;
        Ok(())
    }

    fn finish(&mut self) -> Result<(), String> {
        self.check()?;
        self.reap(true)?;
        self.check()
    }
}

impl Region {
    fn bytes(&self) -> usize {
        self.pages.len() * PAGE
    }

    fn part(&self, start: usize, end: usize) -> Self {
        Self {
            at: self.at + start * PAGE,
            pages: self.pages[start..end].to_vec(),
            file: self.file.map(|first| first + start),
            ..*self
        }
    }
}

fn unmap(region: &Region) -> Result<(), String> {
    // SAFETY: memory of ours, to which nothing else refers.
    let failed = unsafe { libc::munmap(region.at as *mut _, region.bytes()) } != 0;
    called("munmap", failed)
}

fn protect(region: &Region, protection: i32) -> Result<(), String> {
    // SAFETY: memory of ours; the model knows what may be done with it.
    let failed = unsafe { libc::mprotect(region.at as *mut _, region.bytes(), protection) } != 0;
    called("mprotect", failed)
}

fn madvise(region: &Region, advice: i32) -> Result<(), String> {
    // SAFETY: memory of ours; the model knows what becomes of it.
    let failed = unsafe { libc::madvise(region.at as *mut _, region.bytes(), advice) } != 0;
    called("madvise", failed)
}
