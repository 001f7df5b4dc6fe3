//! A process to be dumped and restored by the tests of this crate.
//!
//! `workload count FILE MIB`: fills memory with a pattern, then forever checks
//! a part of it, changes it and writes a counter to FILE; ends with status 3
//! when the memory is not what it was.
//!
//! `workload echo PORT`: accepts one connection on 127.0.0.1 and sends every
//! byte back.
//!
//! `workload lines`: answers every line on standard input with `N:line` on
//! standard output.

use std::io::{BufRead as _, Read as _, Seek as _, Write as _};
use std::time::Duration;
use std::{env, fs, io, net, process, thread};

const PAGE: usize = 4096;

fn main() -> io::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["count", file, mib] => count(file, mib),
        ["echo", port] => echo(port),
        ["lines"] => lines(),
        _ => Err(io::Error::other("usage: workload count|echo|lines ...")),
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
