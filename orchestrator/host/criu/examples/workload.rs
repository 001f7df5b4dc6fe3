//! A process to be dumped and restored by the tests of this crate.
//!
//! `workload count FILE MIB`: fills memory with a pattern, then forever checks
//! a part of it, changes it and writes a counter to FILE; ends with status 3
//! when the memory is not what it was.
//!
//! `workload echo PORT`: accepts one connection on 127.0.0.1 and sends every
//! byte back.
//!
//! `workload tracked SOCKET FILE MIB`: fills memory, protects all of it but 64
//! pages with a userfaultfd of its own, and serves one connection to SOCKET:
//! first it says `FD ADDRESS PAGES ADDRESS PAGES`, protected pages before the
//! others, and closes FD upon the first line. Then `write PAGE VALUE` changes
//! one of the pages, `sum` asks for the sum of them all. Without the connection
//! it writes a counter and that sum to FILE forever.
//!
//! `workload lines`: answers every line on standard input with `N:line` on
//! standard output.

use std::io::{BufRead as _, Read as _, Seek as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use std::{env, fs, io, net, process, thread};

const PAGE: usize = 4096;

fn main() -> io::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["count", file, mib] => count(file, mib),
        ["echo", port] => echo(port),
        ["lines"] => lines(),
        ["tracked", socket, file, mib] => tracked(socket, file, mib),
        _ => Err(io::Error::other(
            "usage: workload count|echo|tracked|lines ...",
        )),
    }
}

fn number(text: &str) -> io::Result<usize> {
    text.parse()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))
}

fn count(file: &str, mib: &str) -> io::Result<()> {
    let pages = number(mib)? * 256;
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(file)?;
    // Every page holds its own number and how often it was visited.
    let mut memory = vec![0u8; pages * PAGE];
    let word = |page: usize, visits: usize| ((page << 20) + visits).to_le_bytes();
    for page in 0..pages {
        memory[page * PAGE..][..8].copy_from_slice(&word(page, 0));
    }
    for counter in 1usize.. {
        let page = counter % pages;
        let visits = counter / pages;
        let at = &mut memory[page * PAGE..][..8];
        // Page 0 is not visited in the first round.
        let before = if page == 0 { visits - 1 } else { visits };
        if *at != word(page, before) {
            eprintln!("page {page} is wrong in step {counter}");
            process::exit(3);
        }
        at.copy_from_slice(&word(page, before + 1));
        file.rewind()?;
        file.write_all(format!("{counter}\n").as_bytes())?;
        if counter % 64 == 0 {
            thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(())
}

fn echo(port: &str) -> io::Result<()> {
    let listener = net::TcpListener::bind(format!("127.0.0.1:{port}"))?;
    let (mut stream, _) = listener.accept()?;
    let mut buffer = [0; 4096];
    loop {
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..read])?;
    }
}

fn lines() -> io::Result<()> {
    let mut output = io::stdout();
    for (count, line) in (1..).zip(io::stdin().lock().lines()) {
        writeln!(output, "{count}:{}", line?)?;
        output.flush()?;
    }
    Ok(())
}

/// Pages that are not protected.
const UNPROTECTED: usize = 64;

/// Pages of their own mapping; page 0 is the first.
struct Pages {
    at: *mut u8,
    count: usize,
}

impl Pages {
    fn new(count: usize) -> io::Result<Self> {
        // SAFETY: a new mapping, which is never unmapped.
        let at = unsafe {
            let at = libc::mmap(
                std::ptr::null_mut(),
                count * PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if at == libc::MAP_FAILED || libc::madvise(at, count * PAGE, libc::MADV_NOHUGEPAGE) != 0
            {
                return Err(io::Error::last_os_error());
            }
            at.cast()
        };
        let pages = Self { at, count };
        for page in 0..count {
            // Nowhere zero, and no page like another.
            for word in 0..PAGE / 8 {
                pages.set(page, word, (page << 16 | word << 1 | 1) as u64);
            }
        }
        Ok(pages)
    }

    fn set(&self, page: usize, word: usize, value: u64) {
        assert!(page < self.count && word < PAGE / 8);
        // SAFETY: within the mapping.
        unsafe {
            self.at
                .cast::<u64>()
                .add(page * PAGE / 8 + word)
                .write_volatile(value)
        };
    }

    fn sum(&self, mut sum: u64) -> u64 {
        // SAFETY: the mapping, which nobody else writes.
        let words =
            unsafe { std::slice::from_raw_parts(self.at.cast::<u64>(), self.count * PAGE / 8) };
        for word in words {
            sum = (sum.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        sum
    }

    /// Protects them with a new userfaultfd, asynchronously.
    fn protect(&self) -> io::Result<i32> {
        let check = |result: i64| match result {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(i32::try_from(result).unwrap_or(-1)),
        };
        let (start, length) = (self.at.addr() as u64, (self.count * PAGE) as u64);
        // UFFDIO_API with WP_ASYNC, REGISTER for WP, WRITEPROTECT.
        let requests = [
            (0xc018_aa3f, [0xaa, 1 << 15, 0, 0]),
            (0xc020_aa00, [start, length, 1 << 1, 0]),
            (0xc018_aa06, [start, length, 1, 0]),
        ];
        // SAFETY: arguments of at least the size that each request has.
        unsafe {
            // UFFD_USER_MODE_ONLY.
            let fd = check(libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | 1))?;
            for (request, mut argument) in requests {
                check(libc::ioctl(fd, request, &raw mut argument).into())?;
            }
            Ok(fd)
        }
    }
}

fn tracked(socket: &str, file: &str, mib: &str) -> io::Result<()> {
    let (pages, others) = (Pages::new(number(mib)? * 256)?, Pages::new(UNPROTECTED)?);
    let fd = pages.protect()?;
    let sum = || others.sum(pages.sum(1));
    let file = fs::File::create(file)?;
    {
        let stream = UnixStream::connect(socket)?;
        writeln!(
            &stream,
            "{fd} {} {} {} {}",
            pages.at.addr(),
            pages.count,
            others.at.addr(),
            others.count
        )?;
        let mut lines = io::BufReader::new(&stream).lines();
        lines.next().transpose()?;
        // SAFETY: opened above, and known to nothing else here.
        unsafe { libc::close(fd) };
        writeln!(&stream, "closed")?;
        for line in lines {
            match line?.split(' ').collect::<Vec<_>>()[..] {
                ["write", page, value] => {
                    pages.set(number(page)?, 7, number(value)? as u64);
                    writeln!(&stream, "written")?;
                }
                ["sum"] => writeln!(&stream, "{}", sum())?,
                _ => return Err(io::Error::other("unknown command")),
            }
        }
    }
    for counter in 1.. {
        use std::os::unix::fs::FileExt as _;
        let text = format!("{counter:>20} {:>20}\n", sum());
        file.write_all_at(text.as_bytes(), 0)?;
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
