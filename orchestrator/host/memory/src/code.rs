//! Where CRIU puts code of its own into the tasks that it dumps.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use migrate_core::wire::PAGE_BYTES;

use crate::error::MemoryError;
use crate::maps::{self, Vma};

/// Pages of a task in which CRIU lets it execute system calls, ascending: it puts
/// an instruction over what is there, and puts that back afterwards, many times in
/// a dump (`compel_execute_syscall` in CRIU's `compel/src/lib/infect.c`). The place
/// is the start of an executable mapping, whichever has room (`get_exec_start` in
/// `criu/parasite-syscall.c`).
///
/// The pages that CRIU sends are references until somebody reads them, so what
/// comes of these may be CRIU's code. What the task has there is seen once CRIU
/// has done with it, by [`read_page`].
///
/// # Errors
///
/// The mappings cannot be read.
pub fn code_pages(pid: u32) -> Result<Vec<u64>, MemoryError> {
    Ok(code_pages_in(&maps::read(pid.cast_signed())?).collect())
}

/// The same of mappings that were read.
pub(crate) fn code_pages_in(vmas: &[Vma]) -> impl Iterator<Item = u64> {
    let programs = vmas.iter().filter(|vma| vma.executable);
    programs.map(|vma| vma.range.start)
}

/// Content of one page of a task that stands still.
///
/// # Errors
///
/// It cannot be read.
pub fn read_page(pid: u32, vaddr: u64) -> Result<Vec<u8>, MemoryError> {
    let pid = pid.cast_signed();
    let path = format!("/proc/{pid}/mem");
    let mut page = vec![0; PAGE_BYTES];
    File::open(&path)
        .and_then(|memory| memory.read_exact_at(&mut page, vaddr))
        .map_err(|source| maps::proc_failed(pid, &path, source))?;
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pages_are_those_of_programs() {
        let pid = std::process::id();
        let pages = code_pages(pid).unwrap();
        assert!(pages.is_sorted());
        // This very program, the C library, the vDSO.
        assert!(pages.len() >= 3, "{pages:x?}");
        let data = Box::new(0u8);
        let own = std::ptr::from_ref(data.as_ref()).addr() as u64;
        assert!(!pages.contains(&(own / 4096 * 4096)));
        for page in pages.into_iter().take(2) {
            // SAFETY: the start of a mapping of this program's own code.
            let here = unsafe { std::slice::from_raw_parts(page as *const u8, PAGE_BYTES) };
            assert_eq!(read_page(pid, page).unwrap(), here);
        }
    }
}
