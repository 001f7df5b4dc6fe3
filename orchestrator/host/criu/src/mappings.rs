//! The eBPF program by which CRIU learns the flags of mappings without the kernel's
//! looking at every page of them; migrate-shim gives CRIU its answers.
//!
//! Where the kernel keeps the flags differs from build to build. It is found by this
//! process's own mappings, some made for the purpose with every flag that can be had,
//! whose flags `smaps` tells: the one place at which all of them stand as they should.
//! So what the program says has been held against the kernel's own words before anybody
//! relies on it. Where there is no such place CRIU reads `smaps` itself.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd, FromRawFd as _, OwnedFd, RawFd};

use aya::programs::Iter;
use aya::{Btf, EbpfLoader};
use migrate_ebpf_common::mapping::{HEAD_WORDS, Mapping};
use migrate_shim::flags::{Addresses, NAMES, goes_on};
use migrate_shim::mappings::iterate;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap_anonymous, munmap};
use tokio::sync::OnceCell;

use crate::worker::above_standard;

/// Names of the programs in the object, and of what is set in it.
const HEADS: &str = "heads";
const FLAGS: &str = "flags";
const FLAGS_AT: &str = "FLAGS_AT";
/// The kind of iterator.
const KIND: &str = "task_vma";

/// A look that another thread's mapping has disturbed is taken again.
const LOOKS_MAX: u32 = 4;
/// Most mappings that this process may have: those that Linux grants where nobody has
/// asked for more (`vm.max_map_count`).
const RECORDS_MAX: usize = 65_530;
/// Bytes that are asked for at once.
const READ_BYTES: usize = 64 << 10;

/// Flags that every kernel can be made to set, so that they are among those compared:
/// `gd`, `sr`, `rr`, `dc`, `wf`, `dd`, and `io` and `pf` of the kernel's own page of data
/// for clocks (`[vvar]`).
const SEEN: u64 = 0x100 | 0x400 | 0x4000 | 0x8000 | 0x1_0000 | 0x2_0000 | 0x200_0000 | 0x400_0000;

/// Where a mapping is: its first address and the first behind it.
type Place = (u64, u64);

/// The program, loaded once for this process; `None` where it cannot be relied on.
pub(crate) async fn program() -> Option<RawFd> {
    static PROGRAM: OnceCell<Option<OwnedFd>> = OnceCell::const_new();
    let load = || async {
        let loaded = tokio::task::spawn_blocking(load).await;
        match loaded.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(program) => Some(program),
            Err(why) => {
                tracing::debug!(why, "CRIU reads the flags of mappings from smaps");
                None
            }
        }
    };
    PROGRAM
        .get_or_init(load)
        .await
        .as_ref()
        .map(AsRawFd::as_raw_fd)
}

fn load() -> Result<OwnedFd, String> {
    let btf = Btf::from_sys_fs().map_err(|error| format!("the kernel's types: {error}"))?;
    let heads = verified(&btf, HEADS, 0)?;
    let odd = OddMappings::make();
    let mut why = String::new();
    for _ in 0..LOOKS_MAX {
        match compare(&heads, &btf) {
            Ok(program) => {
                drop(odd);
                return above_standard(program).map_err(|error| error.to_string());
            }
            Err(error) => why = error,
        }
    }
    Err(why)
}

/// Finds the place of the flags, and holds what the program says then against `smaps`.
fn compare(heads: &OwnedFd, btf: &Btf) -> Result<OwnedFd, String> {
    let told = told()?;
    let heads: HashMap<Place, [u64; HEAD_WORDS]> = records(heads.as_raw_fd(), std::process::id())?
        .into_iter()
        .map(|head: [u64; HEAD_WORDS]| ((head[0], head[1]), head))
        .collect();
    let at = place(&told, &heads)?;
    let program = verified(btf, FLAGS, at)?;
    let said = records(program.as_raw_fd(), std::process::id())?
        .into_iter()
        .map(|[start, end, flags]| ((start, end), flags));
    differences(&told, &said.collect())?;
    Ok(program)
}

/// Where the flags stand, in bytes.
fn place(
    told: &HashMap<Place, u64>,
    heads: &HashMap<Place, [u64; HEAD_WORDS]>,
) -> Result<u32, String> {
    // Behind both addresses.
    let mut places = (2..HEAD_WORDS).filter(|&word| {
        let said = heads.iter().map(|(place, head)| (*place, head[word]));
        differences(told, &said.collect()).is_ok()
    });
    match (places.next(), places.next()) {
        (Some(word), None) => {
            u32::try_from(word * size_of::<u64>()).map_err(|error| error.to_string())
        }
        (None, _) => Err("no part of the kernel's mappings has their flags".to_owned()),
        (Some(_), Some(_)) => {
            Err("several parts of the kernel's mappings look like flags".to_owned())
        }
    }
}

/// Whether both say the same of all mappings that both know, and whether these show
/// enough.
fn differences(told: &HashMap<Place, u64>, said: &HashMap<Place, u64>) -> Result<(), String> {
    let known = NAMES.iter().fold(0, |all, (bit, _)| all | bit);
    let mut seen = 0;
    for (place, told) in told {
        let Some(said) = said.get(place) else {
            continue;
        };
        if said & known != *told {
            return Err(format!(
                "smaps has flags {told:#x} for the mapping at {:#x}, the program {said:#x}",
                place.0
            ));
        }
        seen |= told;
    }
    if seen & SEEN == SEEN {
        Ok(())
    } else {
        Err(format!("no mapping has the flags {:#x}", SEEN & !seen))
    }
}

/// What `smaps` tells of a mapping.
struct Told {
    place: Place,
    flags: u64,
    /// The kernel may take pages of it at any moment, for its program may have given them
    /// back (`MADV_FREE`).
    given_back: bool,
}

/// What `smaps` tells of a process's mappings. The kernel looks at every page for that.
fn smaps(pid: u32) -> Result<Vec<Told>, String> {
    let path = format!("/proc/{pid}/smaps");
    // File names may be any bytes.
    let text = fs::read(&path).map_err(|error| format!("{path}: {error}"))?;
    let text = String::from_utf8_lossy(&text);
    // Memory that was given back is told under its own name only once it has come off a
    // list of the kernel's, some pages later (`folio_mark_lazyfree`); clean it is at once.
    let clean = ["LazyFree:", "Private_Clean:", "Shared_Clean:"];
    let mut told = Vec::new();
    let mut place = None;
    let mut given_back = false;
    for line in text.lines() {
        if let Some(names) = line.strip_prefix("VmFlags:") {
            let of = |name: &str| {
                let known = NAMES.iter().find(|(_, known)| known == name.as_bytes());
                known.map_or(0, |(bit, _)| *bit)
            };
            let flags = names.split_whitespace().fold(0, |all, name| all | of(name));
            told.extend(place.take().map(|place| Told {
                place,
                flags,
                given_back,
            }));
        } else if let Some(kib) = clean.iter().find_map(|name| line.strip_prefix(name)) {
            given_back |= kib.trim() != "0 kB";
        } else {
            let mut addresses = Addresses::default();
            line.bytes().for_each(|byte| addresses.feed(byte));
            if let Some(next) = addresses.get() {
                (place, given_back) = (Some(next), false);
            }
        }
    }
    Ok(told)
}

/// What `smaps` tells of this process's mappings.
fn told() -> Result<HashMap<Place, u64>, String> {
    let told = smaps(std::process::id())?.into_iter();
    Ok(told.map(|told| (told.place, told.flags)).collect())
}

/// Memory that a copy has to have before it runs, by task, ascending.
pub type Held = BTreeMap<u32, Vec<Range<u64>>>;

/// What of these processes' memory cannot wait until their copies run, though CRIU may think
/// it can: what one of them has locked, and what others have there; what their children find
/// zeros in; and if it is to be `compared` later, what may be zeros by then, for its program
/// has given it back. `None` where that cannot be told without a look at every page, which
/// only what is compared is worth.
///
/// They stand still: what they change meanwhile is not seen.
pub async fn held(pids: &[u32], compared: bool) -> Option<Held> {
    let program = if compared {
        None
    } else {
        Some(program().await?)
    };
    let of = move |pid| match program {
        Some(program) => Ok(records(program, pid)?
            .into_iter()
            .map(|[start, end, flags]| Told {
                place: (start, end),
                flags,
                given_back: false,
            })
            .collect()),
        None => smaps(pid),
    };
    let pids = pids.to_vec();
    let look = move || -> Result<Vec<(u32, Vec<Told>)>, String> {
        let mappings = pids.into_iter().map(|pid| Ok((pid, of(pid)?)));
        mappings.collect()
    };
    let looked = tokio::task::spawn_blocking(look).await;
    match looked.unwrap_or_else(|error| Err(error.to_string())) {
        Ok(mappings) => Some(held_of(mappings)),
        Err(why) => {
            tracing::debug!(why, "the flags of mappings are not known");
            None
        }
    }
}

fn held_of(mappings: Vec<(u32, Vec<Told>)>) -> Held {
    /// `VM_LOCKED` and `VM_WIPEONFORK` of `include/linux/mm.h`.
    const LOCKED: u64 = 0x2000;
    const WIPED: u64 = 0x200_0000;
    let mut all: Vec<Range<u64>> = mappings
        .iter()
        .flat_map(|(_, told)| told)
        .filter(|told| told.flags & LOCKED != 0)
        .map(|told| told.place.0..told.place.1)
        .collect();
    all.sort_by_key(|range| range.start);
    let mut locked: Vec<Range<u64>> = Vec::new();
    for range in all {
        match locked.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => locked.push(range),
        }
    }
    let held = mappings.into_iter().map(|(pid, told)| {
        let cannot_wait = told.into_iter().filter(|told| {
            let (start, end) = told.place;
            let at = locked.partition_point(|range| range.end <= start);
            told.given_back
                || told.flags & WIPED != 0
                || locked.get(at).is_some_and(|range| range.start < end)
        });
        let ranges = cannot_wait.map(|told| told.place.0..told.place.1);
        (pid, ranges.collect())
    });
    held.collect()
}

/// All records that a program writes about a process.
fn records<const WORDS: usize>(program: RawFd, pid: u32) -> Result<Vec<[u64; WORDS]>, String> {
    let failed = |error: io::Error| format!("the program does not run: {error}");
    let fd = RawFd::try_from(iterate(program, pid)).unwrap_or(-1);
    if fd < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    // SAFETY: a new descriptor that nobody else owns.
    let mut iterator = unsafe { File::from_raw_fd(fd) };
    let mut records: Vec<[u64; WORDS]> = Vec::new();
    // The kernel gives whole records, 32 KiB of them at most (`bpf_seq_read`).
    let mut bytes = vec![0; READ_BYTES];
    loop {
        let got = iterator.read(&mut bytes).map_err(failed)?;
        if got == 0 {
            return Ok(records);
        }
        for record in bytes[..got].chunks_exact(WORDS * size_of::<u64>()) {
            let mut words = [0; WORDS];
            for (word, bytes) in words.iter_mut().zip(record.chunks_exact(size_of::<u64>())) {
                let mut own = [0; size_of::<u64>()];
                own.copy_from_slice(bytes);
                *word = u64::from_ne_bytes(own);
            }
            if !records.last().is_none_or(|last| goes_on(last[1], words[0])) {
                return Ok(records);
            }
            if records.len() == RECORDS_MAX {
                return Err("the process has too many mappings".to_owned());
            }
            records.push(words);
        }
    }
}

/// Has the kernel verify a program.
fn verified(btf: &Btf, name: &str, flags_at: u32) -> Result<OwnedFd, String> {
    const { assert!(size_of::<Mapping>() == 3 * size_of::<u64>()) };
    let failed =
        |error: &dyn std::error::Error| format!("the program {name} is not taken: {error}");
    let mut ebpf = EbpfLoader::new()
        .btf(Some(btf))
        .override_global(FLAGS_AT, &flags_at, true)
        .load(migrate_ebpf_objects::MAPPINGS)
        .map_err(|error| failed(&error))?;
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| format!("the object has no program {name}"))?;
    let program: &mut Iter = program
        .try_into()
        .map_err(|error: aya::programs::ProgramError| failed(&error))?;
    program.load(KIND, btf).map_err(|error| failed(&error))?;
    let fd = program.fd().map_err(|error| failed(&error))?;
    fd.as_fd()
        .try_clone_to_owned()
        .map_err(|error| failed(&error))
}

/// Mappings with every flag that can be had, each apart from the others.
struct OddMappings(Vec<(std::ptr::NonNull<libc::c_void>, usize)>);

impl OddMappings {
    /// A flag that this kernel does not set is in nobody's mapping here, and `smaps` tells so.
    fn make() -> Self {
        let page = std::num::NonZeroUsize::MIN.saturating_add(migrate_core::wire::PAGE_BYTES - 1);
        let mut made = Vec::new();
        let mut map = |flags: MapFlags| {
            let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            // SAFETY: a new mapping at an address of the kernel's choice.
            let at =
                unsafe { mmap_anonymous(None, page, protection, MapFlags::MAP_PRIVATE | flags) };
            at.inspect(|at| made.push((*at, page.get()))).ok()
        };
        for flags in [MapFlags::MAP_GROWSDOWN, MapFlags::MAP_NORESERVE] {
            map(flags);
        }
        for advice in [
            MmapAdvise::MADV_SEQUENTIAL,
            MmapAdvise::MADV_RANDOM,
            MmapAdvise::MADV_DONTFORK,
            MmapAdvise::MADV_DONTDUMP,
            MmapAdvise::MADV_MERGEABLE,
            MmapAdvise::MADV_HUGEPAGE,
            MmapAdvise::MADV_NOHUGEPAGE,
            MmapAdvise::MADV_WIPEONFORK,
        ] {
            if let Some(at) = map(MapFlags::empty()) {
                // SAFETY: of the mapping that was just made, whose content is nobody's.
                let _ = unsafe { madvise(at, page.get(), advice) };
            }
        }
        if let Some(at) = map(MapFlags::empty()) {
            // SAFETY: as above.
            let _ = unsafe { mlock(at, page.get()) };
        }
        Self(made)
    }
}

impl Drop for OddMappings {
    fn drop(&mut self) {
        for (at, length) in self.0.drain(..) {
            // SAFETY: made above, and used by nobody.
            let _ = unsafe { munmap(at, length) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mappings(flags: &[u64]) -> HashMap<Place, u64> {
        let places = (0..).map(|n| (n << 12, (n + 1) << 12));
        places.zip(flags.iter().copied()).collect()
    }

    #[test]
    fn flags_that_differ_or_show_too_little_are_no_flags() {
        let told = mappings(&[SEEN, 0, 0x2000]);
        // What CRIU does not ask for may be there.
        assert_eq!(
            differences(&told, &mappings(&[SEEN | 0x73, 0x75, 0x2001])),
            Ok(())
        );
        // What one alone knows is left aside.
        assert_eq!(differences(&told, &mappings(&[SEEN])), Ok(()));
        for said in [&[SEEN, 0, 0][..], &[SEEN, 0x100], &[0, SEEN], &[]] {
            assert!(differences(&told, &mappings(said)).is_err(), "{said:x?}");
        }
    }

    #[test]
    fn the_place_is_the_only_one_that_fits() {
        let told = mappings(&[SEEN, 0x100]);
        let heads = |words: &[usize]| -> HashMap<Place, [u64; HEAD_WORDS]> {
            let of = |(place, flags): (&Place, &u64)| {
                let mut head = [0; HEAD_WORDS];
                words.iter().for_each(|&word| head[word] = *flags);
                (*place, head)
            };
            told.iter().map(of).collect()
        };
        assert_eq!(place(&told, &heads(&[4])), Ok(32));
        assert!(place(&told, &heads(&[])).is_err());
        // The addresses themselves are not looked at.
        assert!(place(&told, &heads(&[0, 1])).is_err());
        assert!(place(&told, &heads(&[4, 5])).is_err());
    }

    /// On a kernel that has what it takes; the verifier's word is that of the kernel which
    /// runs the test.
    #[tokio::test]
    async fn the_program_says_what_smaps_says() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP the_program_says_what_smaps_says: not root");
            return;
        }
        let program = load().expect("loaded and compared");
        let odd = OddMappings::make();
        assert_eq!(odd.0.len(), 11);
        // More than the kernel gives in one read.
        const MANY: usize = 4000;
        let page = migrate_core::wire::PAGE_BYTES;
        let length = std::num::NonZeroUsize::new(MANY * page).unwrap();
        // SAFETY: a new mapping that nobody uses, of which every second page changes.
        let at = unsafe {
            let flags = MapFlags::MAP_PRIVATE;
            let at = mmap_anonymous(None, length, ProtFlags::PROT_NONE, flags).unwrap();
            for second in (0..MANY).step_by(2) {
                nix::sys::mman::mprotect(at.byte_add(second * page), page, ProtFlags::PROT_READ)
                    .unwrap();
            }
            at
        };
        let look = || {
            let told = told()?;
            let said = records(program.as_raw_fd(), std::process::id())?
                .into_iter()
                .map(|[start, end, flags]| ((start, end), flags))
                .collect();
            differences(&told, &said).map(|()| (told, said))
        };
        // Another test may map something else where it had something a moment ago.
        let mut looked = look();
        for _ in 1..LOOKS_MAX {
            looked = looked.or_else(|_| look());
        }
        let (told, said) = looked.unwrap();
        let first = at.addr().get() as u64;
        for start in (first..first + length.get() as u64).step_by(page) {
            // At either end the kernel may join one with its neighbour.
            let place = (start, start + page as u64);
            assert_eq!(
                told.contains_key(&place),
                said.contains_key(&place),
                "{start:#x}"
            );
        }
        assert!(said.len() >= MANY);
        // SAFETY: made above, and used by nobody.
        unsafe { munmap(at, length.get()) }.unwrap();
    }

    #[tokio::test]
    async fn what_is_locked_wiped_or_given_back_is_held() {
        let Some(_) = program().await else {
            println!(
                "SKIP what_is_locked_wiped_or_given_back_is_held: the program cannot be relied on"
            );
            return;
        };
        let page = migrate_core::wire::PAGE_BYTES;
        // Names of files may be any bytes.
        let name = c"\xffPrivate_Clean: 4 kB";
        // SAFETY: a new descriptor that nobody else owns.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(name.as_ptr(), 0)) };
        file.set_len(page as u64).unwrap();
        // SAFETY: a new mapping, which nobody uses.
        let named = unsafe {
            let one = std::num::NonZeroUsize::new(page).unwrap();
            nix::sys::mman::mmap(
                None,
                one,
                ProtFlags::PROT_NONE,
                MapFlags::MAP_SHARED,
                &file,
                0,
            )
        };
        let named = named.unwrap();
        let length = std::num::NonZeroUsize::new(6 * page).unwrap();
        // SAFETY: a new mapping; what is locked, advised, changed and written to is within it.
        let at = unsafe {
            let at = mmap_anonymous(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_PRIVATE,
            )
            .unwrap();
            mlock(at.byte_add(page), page).unwrap();
            madvise(at.byte_add(3 * page), page, MmapAdvise::MADV_WIPEONFORK).unwrap();
            // A mapping of its own.
            let last = at.byte_add(5 * page);
            let all = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE | ProtFlags::PROT_EXEC;
            nix::sys::mman::mprotect(last, page, all).unwrap();
            last.cast::<u8>().write(1);
            madvise(last, page, MmapAdvise::MADV_FREE).unwrap();
            at
        };
        let pid = std::process::id();
        let first = at.addr().get() as u64;
        for (compared, last) in [(false, false), (true, true)] {
            let held = held(&[pid], compared).await.unwrap().remove(&pid).unwrap();
            assert!(held.is_sorted_by(|one, next| one.end <= next.start));
            let is_held: Vec<bool> = (first..)
                .step_by(page)
                .take(6)
                .map(|page| held.iter().any(|range| range.contains(&page)))
                .collect();
            assert_eq!(
                is_held,
                [false, true, false, true, false, last],
                "{compared}: {held:x?}"
            );
        }
        // SAFETY: made above, and used by nobody.
        unsafe { munmap(at, length.get()).and(munmap(named, page)) }.unwrap();
    }
}
