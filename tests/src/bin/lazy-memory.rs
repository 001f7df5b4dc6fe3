//! A process whose memory is taken apart while it arrives.
//!
//! `lazy-memory MODE MIB SEED FILE GO`: fills memory, writes `ready` to FILE,
//! waits until GO exists, does what MODE says, and writes `ok` or what is wrong
//! to FILE. Modes: `check` reads everything three times, `threads` reads and
//! writes with four threads, `churn` maps, moves, gives back and forks at
//! random, `fork` forks four times at once, `family` has a child from before that has changed a part, `hang`
//! reads on for good, `idle` touches nothing for good, `wait` ends at once,
//! `patient` touches nothing until GO-now exists and then reads, `aligned` does what `check` does and
//! has a thread whose stack pointer is at the start of a page. `busy-MODE` writes to all of its memory
//! again and again while it waits. Every byte is checked.

use std::path::Path;
use std::time::Duration;
use std::{env, fs, io, thread};

const PAGE: usize = 4096;

fn main() -> io::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [mode, mib, seed, file, go] = arguments.as_slice() else {
        return Err(io::Error::other("usage: lazy-memory MODE MIB SEED FILE GO"));
    };
    let number = |text: &String| text.parse::<u64>().map_err(io::Error::other);
    let mut model = Model::new(number(seed)?);
    // In mappings of their own, which the kernel may merge.
    for _ in 0..number(mib)? {
        model.map(256, true)?;
    }
    let child = match mode.as_str() {
        "family" => Some(model.family()?),
        _ => None,
    };
    if mode.ends_with("aligned") {
        thread::spawn(wait_aligned);
    }
    if child != Some(0) {
        fs::write(file, "ready")?;
    }
    let (mode, busy) = match mode.strip_prefix("busy-") {
        Some(mode) => (mode, true),
        None => (mode.as_str(), false),
    };
    while !Path::new(go).exists() {
        if busy {
            model.rewrite(Path::new(go));
        } else {
            thread::sleep(Duration::from_millis(1));
        }
    }
    let result = match mode {
        "check" | "aligned" => (0..3).try_for_each(|_| model.check()),
        "threads" => model.threads(),
        "churn" => model.churn(4000),
        "fork" => (0..4)
            .try_for_each(|_| model.fork())
            .and_then(|()| model.check())
            .and_then(|()| model.reap()),
        "family" if child == Some(0) => {
            std::process::exit(i32::from(model.check().is_err()));
        }
        "family" => {
            model.children += 1;
            model.check().and_then(|()| model.reap())
        }
        "hang" => loop {
            if let Err(error) = model.check() {
                break Err(error);
            }
        },
        "idle" => loop {
            thread::park();
        },
        "patient" => {
            let now = format!("{go}-now");
            while !Path::new(&now).exists() {
                thread::sleep(Duration::from_millis(1));
            }
            model.check()
        }
        "wait" => Ok(()),
        _ => Err("unknown mode".to_owned()),
    };
    let text = result.map_or_else(|error| error, |()| "ok".to_owned());
    // Whole at once.
    let part = format!("{file}.part");
    fs::write(&part, text)?;
    fs::rename(part, file)
}

/// What a page must hold: the pattern of a number, or zeros for 0.
type Pattern = u64;

#[derive(Clone)]
struct Region {
    at: usize,
    pages: Vec<Pattern>,
}

/// Waits for good, with a stack pointer that is a multiple of the page size.
#[cfg(target_arch = "x86_64")]
fn wait_aligned() {
    // SAFETY: what is on the stack is never used again, and pause(2), the 34th call, uses
    // none of it. The place is within the stack, which is larger than a page.
    unsafe {
        std::arch::asm!(
            "and rsp, -4096",
            "2:",
            "mov eax, 34",
            "syscall",
            "jmp 2b",
            options(noreturn)
        )
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn wait_aligned() {}

struct Model {
    regions: Vec<Region>,
    last: Pattern,
    random: u64,
    children: u32,
}

fn word(pattern: Pattern, index: usize) -> u64 {
    if pattern == 0 {
        return 0;
    }
    (pattern << 20 | (index as u64) << 1 | 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn fill(at: usize, pattern: Pattern) {
    for index in 0..PAGE / 8 {
        // SAFETY: `at` is a page of a writable mapping of ours.
        unsafe {
            (at as *mut u64)
                .add(index)
                .write_volatile(word(pattern, index));
        }
    }
}

fn check(at: usize, pattern: Pattern) -> Result<(), String> {
    for index in 0..PAGE / 8 {
        // SAFETY: `at` is a page of a mapping of ours.
        let found = unsafe { (at as *const u64).add(index).read_volatile() };
        if found != word(pattern, index) {
            return Err(format!(
                "page {at:#x} has {found:#x} at {index} in place of pattern {pattern}"
            ));
        }
    }
    Ok(())
}

fn called(what: &str, result: i64) -> Result<i64, String> {
    if result == -1 {
        return Err(format!("{what}: {}", io::Error::last_os_error()));
    }
    Ok(result)
}

fn reserve(pages: usize) -> io::Result<usize> {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            pages * PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(at.addr())
}

impl Model {
    fn new(seed: u64) -> Self {
        Self {
            regions: Vec::new(),
            last: 0,
            random: seed * 2 + 1,
            children: 0,
        }
    }

    fn random(&mut self, below: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        usize::try_from(self.random % below.max(1) as u64).unwrap_or(0)
    }

    fn pattern(&mut self) -> Pattern {
        self.last += 1;
        self.last
    }

    fn map(&mut self, pages: usize, with_content: bool) -> io::Result<()> {
        let at = reserve(pages)?;
        let mut region = Region {
            at,
            pages: vec![0; pages],
        };
        if with_content {
            for page in 0..pages {
                // Some stay untouched, some hold zeros.
                if page % 16 == 5 {
                    continue;
                }
                let pattern = if page % 16 == 9 { 0 } else { self.pattern() };
                fill(at + page * PAGE, pattern);
                region.pages[page] = pattern;
            }
        }
        self.regions.push(region);
        Ok(())
    }

    /// Writes to every page, until `go` exists.
    fn rewrite(&mut self, go: &Path) {
        for index in 0..self.regions.len() {
            if go.exists() {
                return;
            }
            for page in 0..self.regions[index].pages.len() {
                let pattern = self.pattern();
                let region = &mut self.regions[index];
                region.pages[page] = pattern;
                fill(region.at + page * PAGE, pattern);
            }
        }
    }

    fn check(&self) -> Result<(), String> {
        self.regions.iter().try_for_each(|region| {
            region
                .pages
                .iter()
                .enumerate()
                .try_for_each(|(page, pattern)| check(region.at + page * PAGE, *pattern))
        })
    }

    fn threads(&mut self) -> Result<(), String> {
        let mut parts: Vec<Vec<&mut Region>> = (0..4).map(|_| Vec::new()).collect();
        let order = self.regions.iter_mut().rev().enumerate();
        for (index, region) in order {
            parts[index % 4].push(region);
        }
        thread::scope(|scope| {
            let running: Vec<_> = parts
                .into_iter()
                .map(|mut part| {
                    scope.spawn(move || {
                        for round in 0..2 {
                            for region in &mut part {
                                for page in 0..region.pages.len() {
                                    // Far apart, so that each is a fault.
                                    let page = page * 97 % region.pages.len();
                                    let at = region.at + page * PAGE;
                                    check(at, region.pages[page])?;
                                    if page % 3 == round {
                                        region.pages[page] += 1;
                                        fill(at, region.pages[page]);
                                    }
                                }
                            }
                        }
                        Ok::<(), String>(())
                    })
                })
                .collect();
            running
                .into_iter()
                .try_for_each(|thread| thread.join().unwrap_or_else(|_| Err("panic".to_owned())))
        })?;
        self.check()
    }

    /// A part of a region, cut out of it as a region of its own.
    fn cut(&mut self) -> Region {
        let index = self.random(self.regions.len());
        let region = self.regions.swap_remove(index);
        let start = self.random(region.pages.len());
        let count = 1 + self.random((region.pages.len() - start).min(100));
        let end = (start + count).min(region.pages.len());
        let part = |range: std::ops::Range<usize>| Region {
            at: region.at + range.start * PAGE,
            pages: region.pages[range].to_vec(),
        };
        for rest in [part(0..start), part(end..region.pages.len())] {
            if !rest.pages.is_empty() {
                self.regions.push(rest);
            }
        }
        part(start..end)
    }

    fn churn(&mut self, steps: usize) -> Result<(), String> {
        for step in 0..steps {
            self.step()
                .map_err(|error| format!("step {step}: {error}"))?;
            // Early, while it arrives, and later.
            if step < 64 && step % 12 == 3 || step % 1000 == 250 {
                self.fork()?;
            }
        }
        self.check()?;
        self.reap()
    }

    /// Forks a child; both go on with some pages of their own.
    fn family(&mut self) -> io::Result<i32> {
        // SAFETY: this process has one thread.
        let child = unsafe { libc::fork() };
        if child == -1 {
            return Err(io::Error::last_os_error());
        }
        let first = usize::from(child == 0);
        for region in &mut self.regions {
            for page in (first..region.pages.len()).step_by(7) {
                region.pages[page] += 1 << 32;
                fill(region.at + page * PAGE, region.pages[page]);
            }
        }
        Ok(child)
    }

    fn reap(&self) -> Result<(), String> {
        for _ in 0..self.children {
            let mut status = 0;
            // SAFETY: room for a status.
            let pid = unsafe { libc::wait(&raw mut status) };
            called("wait", pid.into())?;
            if status != 0 {
                return Err(format!("child {pid} ended with {status:#x}"));
            }
        }
        Ok(())
    }

    fn fork(&mut self) -> Result<(), String> {
        // SAFETY: this process has one thread.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error().to_string()),
            0 => {
                // A part of the children changes what it has got.
                let changed = (0..50).try_for_each(|_| self.step());
                let end = changed.and_then(|()| self.check());
                if let Err(error) = &end {
                    eprintln!("{error}");
                }
                std::process::exit(i32::from(end.is_err()));
            }
            _ => {
                self.children += 1;
                Ok(())
            }
        }
    }

    fn step(&mut self) -> Result<(), String> {
        let choice = self.random(100);
        let mut part = self.cut();
        let bytes = part.pages.len() * PAGE;
        let at = part.at as *mut libc::c_void;
        match choice {
            0..30 => {
                for (page, pattern) in part.pages.iter().enumerate() {
                    check(part.at + page * PAGE, *pattern)?;
                }
            }
            30..55 => {
                for page in 0..part.pages.len().min(4) {
                    part.pages[page] = self.pattern();
                    fill(part.at + page * PAGE, part.pages[page]);
                }
            }
            55..65 => {
                // SAFETY: mappings of ours, which nothing else refers to; so in
                // all calls below.
                called("munmap", unsafe { libc::munmap(at, bytes) }.into())?;
                return match self.regions.len() {
                    0..8 => self.map(64, false).map_err(|error| error.to_string()),
                    _ => Ok(()),
                };
            }
            65..80 => {
                let to = reserve(part.pages.len()).map_err(|error| error.to_string())?;
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                // A part may consist of several mappings, which older kernels
                // do not move at once: then one by one.
                for page in 0..part.pages.len() {
                    let step = page * PAGE;
                    // SAFETY: as above.
                    let moved =
                        unsafe { libc::mremap(at.byte_add(step), PAGE, PAGE, flags, to + step) };
                    called("mremap", moved as i64)?;
                    if page == 0 {
                        // Or all at once, most of the time.
                        let rest = bytes - PAGE;
                        if rest > 0 && choice < 77 {
                            // SAFETY: as above.
                            let moved = unsafe {
                                libc::mremap(at.byte_add(PAGE), rest, rest, flags, to + PAGE)
                            };
                            if moved != libc::MAP_FAILED {
                                break;
                            }
                        }
                    }
                }
                part.at = to;
            }
            80..90 => {
                // SAFETY: as above.
                let given = unsafe { libc::madvise(at, bytes, libc::MADV_DONTNEED) };
                called("madvise", given.into())?;
                part.pages.fill(0);
            }
            90..95 => {
                for protection in [libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE] {
                    // SAFETY: as above.
                    let protected = unsafe { libc::mprotect(at, bytes, protection) };
                    called("mprotect", protected.into())?;
                    check(part.at, part.pages[0])?;
                }
            }
            _ => self.map(32, false).map_err(|error| error.to_string())?,
        }
        self.regions.push(part);
        Ok(())
    }
}
