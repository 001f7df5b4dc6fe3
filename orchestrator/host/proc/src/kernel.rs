//! What this kernel gives to and takes from programs as they start.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;

use migrate_core::kernel::Rseq;

use crate::{parse, read};

/// Of `uapi/linux/auxvec.h`; there from Linux 6.3 on with `CONFIG_RSEQ`.
const AT_RSEQ_FEATURE_SIZE: u64 = 27;
const AT_RSEQ_ALIGN: u64 = 28;

/// A vDSO has a few pages of code.
const VDSO_BYTES_MAX: usize = 1 << 20;

/// What a vDSO's functions are called, whatever the machine.
const PREFIXES: [&str; 2] = ["__vdso_", "__kernel_"];

/// What this kernel takes of rseq(2).
pub(crate) fn rseq() -> Option<Rseq> {
    if is_missing() {
        return Some(Rseq::Missing);
    }
    Some(of_vector(&fs::read("/proc/self/auxv").ok()?))
}

/// Nobody can register an area of no length: what says so knows the call.
fn is_missing() -> bool {
    // SAFETY: without an area the kernel reads and keeps no memory.
    let done = unsafe { libc::syscall(libc::SYS_rseq, 0, 0, 0, 0) };
    done < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS)
}

/// By the auxiliary vector of a program, pairs of words.
fn of_vector(vector: &[u8]) -> Rseq {
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_ne_bytes);
    let value = |wanted| {
        let mut pairs = vector.chunks_exact(16).map(|pair| pair.split_at(8));
        let (_, value) = pairs.find(|(name, _)| word(name) == wanted)?;
        u32::try_from(word(value)).ok()
    };
    match (value(AT_RSEQ_FEATURE_SIZE), value(AT_RSEQ_ALIGN)) {
        (Some(feature_bytes), Some(align_bytes)) => Rseq::Extensible {
            feature_bytes,
            align_bytes,
        },
        _ => Rseq::Original,
    }
}

/// The functions of the vDSO that this kernel gives to programs.
pub(crate) fn vdso() -> Option<Vec<String>> {
    let maps = read::text("/proc/self/maps").ok()?;
    let Some((start, end)) = area_of(&maps) else {
        return Some(Vec::new());
    };
    let bytes = usize::try_from(end.checked_sub(start)?).ok()?;
    let mut image = vec![0; bytes.min(VDSO_BYTES_MAX)];
    let memory = File::open("/proc/self/mem").ok()?;
    memory.read_exact_at(&mut image, start).ok()?;
    let names = names(&image);
    // One without any is not understood here.
    (!names.is_empty()).then_some(names)
}

fn area_of(maps: &str) -> Option<(u64, u64)> {
    let mut mappings = maps.lines().filter_map(parse::mapping);
    let vdso = mappings.find(|mapping| mapping.path == "[vdso]")?;
    Some((vdso.start, vdso.end))
}

/// The names in the table of strings for the linker, which in a vDSO are those
/// of its functions: it has no other symbols.
fn names(image: &[u8]) -> Vec<String> {
    let names: BTreeSet<&str> = image
        .split(|byte| *byte == 0)
        .filter_map(|text| std::str::from_utf8(text).ok())
        .filter(|text| PREFIXES.iter().any(|prefix| text.starts_with(prefix)))
        .collect();
    names.into_iter().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn this_kernel_is_understood() {
        let names = vdso().unwrap();
        let clock = ["__vdso_clock_gettime", "__kernel_clock_gettime"];
        assert!(
            names.iter().any(|name| clock.contains(&name.as_str())),
            "{names:?}"
        );
        // Every thread of glibc's, this one too, has registered.
        let rseq = rseq().unwrap();
        assert!(rseq.takes(0x1_0000, Rseq::ORIGINAL_BYTES), "{rseq:?}");
    }

    #[test]
    fn the_vector_tells_what_the_kernel_takes() {
        let vector = |pairs: &[(u64, u64)]| -> Vec<u8> {
            let words = pairs.iter().flat_map(|(name, value)| [*name, *value]);
            words.flat_map(u64::to_ne_bytes).collect()
        };
        assert_eq!(of_vector(&vector(&[(6, 4096), (0, 0)])), Rseq::Original);
        let both = [(6, 4096), (27, 28), (28, 32), (0, 0)];
        let expected = Rseq::Extensible {
            feature_bytes: 28,
            align_bytes: 32,
        };
        assert_eq!(of_vector(&vector(&both)), expected);
    }

    #[test]
    fn a_kernel_without_a_vdso_has_none() {
        assert_eq!(area_of("7000-8000 r--p 00000000 00:00 0   [vvar]\n"), None);
        let maps = "1000-2000 r-xp 00000000 00:00 0 /x\n7000-9000 r-xp 0 00:00 0   [vdso]\n";
        assert_eq!(area_of(maps), Some((0x7000, 0x9000)));
        let image = b"\x7fELF\0\0__vdso_time\0linux-vdso.so.1\0__vdso_getcpu\0\xff";
        assert_eq!(names(image), ["__vdso_getcpu", "__vdso_time"]);
    }

    proptest! {
        #[test]
        fn nothing_that_a_kernel_says_makes_it_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..200), text in ".{0,100}",
        ) {
            of_vector(&bytes);
            names(&bytes);
            area_of(&text);
        }
    }
}
