//! A multi-threaded TCP echo whose state is all in memory.
//!
//! One thread accepts, one serves each connection. The counters of a
//! connection live on its thread's stack, so a copy of this process that
//! forgot or repeated anything contradicts its client at once.

use std::io::{self, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use migrate_tests::echo_wire::{
    Kind, Malformed, REQUEST_HEADER_BYTES, Reply, Request, Stat, payload, payload_length,
};
use nix::sys::socket::{self, Backlog};

/// Stack of a connection's thread: the loop needs a few pages, and a
/// thousand connections should not reserve gigabytes.
const STACK_BYTES: usize = 128 * 1024;

/// Numbered TCP echo, one thread per connection.
#[derive(Debug, Parser)]
struct Arguments {
    /// Address and port to listen on, IPv4 or IPv6.
    listen: SocketAddr,
    /// Hold this much memory besides.
    #[arg(long, default_value_t = 0)]
    resident_mib: usize,
    /// Write to pages of it, spread over all of it, at this rate.
    #[arg(long, default_value_t = 0, requires = "resident_mib")]
    dirty_mb_per_s: u32,
    /// Map this much memory besides, and write to one page of each MiB.
    #[arg(long, default_value_t = 0)]
    sparse_gib: usize,
    /// Start so many processes that do nothing.
    #[arg(long, default_value_t = 0)]
    children: u32,
}

#[derive(Debug, Default)]
struct Counters {
    connections: AtomicU64,
    messages: AtomicU64,
    lost: AtomicU64,
    doubled: AtomicU64,
    wrong: AtomicU64,
}

impl Counters {
    fn stat(&self) -> Stat {
        Stat {
            connections: self.connections.load(Ordering::Relaxed),
            messages: self.messages.load(Ordering::Relaxed),
            lost: self.lost.load(Ordering::Relaxed),
            doubled: self.doubled.load(Ordering::Relaxed),
            wrong: self.wrong.load(Ordering::Relaxed),
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.resident_mib > 0 {
        hold(arguments.resident_mib << 20, arguments.dirty_mb_per_s);
    }
    let mut sparse = vec![0_u8; arguments.sparse_gib << 30];
    sparse
        .iter_mut()
        .step_by(1 << 20)
        .for_each(|byte| *byte = 1);
    for _ in 0..arguments.children {
        // They end with the process namespace of the test host.
        if let Err(error) = Command::new("sleep").arg("1000000").spawn() {
            eprintln!("echo-server: could not start a child: {error}");
            return ExitCode::FAILURE;
        }
    }
    let served = accept_forever(arguments.listen);
    drop(sparse);
    match served {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!(
                "echo-server: could not serve on {}: {error}",
                arguments.listen
            );
            ExitCode::FAILURE
        }
    }
}

/// Fills memory with what does not compress to nothing, and goes on writing to
/// it on a thread of its own.
fn hold(bytes: usize, dirty_mb_per_s: u32) {
    const PAGE_BYTES: usize = 4096;
    /// Short enough that the rate is even over a round.
    const TURN: Duration = Duration::from_millis(5);
    let mut state = 1_u64;
    // The numbers of a linear congruential generator, after Knuth.
    let mut next = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        state
    };
    let mut memory = vec![0_u64; bytes / size_of::<u64>()];
    memory.iter_mut().for_each(|word| *word = next());
    let page_words = PAGE_BYTES / size_of::<u64>();
    let pages = u64::try_from(bytes / PAGE_BYTES).unwrap_or(1);
    thread::spawn(move || {
        let begun = Instant::now();
        let mut written = 0_u64;
        loop {
            let due = begun.elapsed().as_micros() * u128::from(dirty_mb_per_s)
                / u128::try_from(PAGE_BYTES).unwrap_or(1);
            while u128::from(written) < due {
                // The upper bits are the better ones.
                let page = usize::try_from((next() >> 20) % pages).unwrap_or(0);
                memory[page * page_words] = next();
                written += 1;
            }
            // Keeps the memory and the compiler's eyes on it.
            std::hint::black_box(&mut memory);
            thread::sleep(TURN);
        }
    });
}

fn accept_forever(listen: SocketAddr) -> io::Result<std::convert::Infallible> {
    let listener = TcpListener::bind(listen)?;
    // The standard library asks for a backlog of 128; a thousand clients that
    // start at once would wait for a retransmitted SYN.
    socket::listen(&listener, Backlog::MAXCONN)?;
    let counters = Arc::new(Counters::default());
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            // The peer gave up between SYN and accept: its loss, not ours.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let counters = Arc::clone(&counters);
        counters.connections.fetch_add(1, Ordering::Relaxed);
        thread::Builder::new()
            .name("echo".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if let Err(error) = serve(&stream, &counters) {
                    counters.wrong.fetch_add(1, Ordering::Relaxed);
                    eprintln!("echo-server: connection ended: {error}");
                }
            })?;
    }
}

/// What one connection has seen so far.
#[derive(Debug, Default)]
struct Session {
    connection: Option<u64>,
    next: u64,
    replies: u64,
    lost: u32,
    doubled: u32,
    wrong: u32,
}

fn serve(stream: &TcpStream, counters: &Counters) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut input = BufReader::new(stream);
    let mut output = stream;
    let mut session = Session {
        next: 1,
        ..Session::default()
    };
    let mut header = [0; REQUEST_HEADER_BYTES];
    let (mut received, mut due, mut reply) = (Vec::new(), Vec::new(), Vec::new());
    while filled(&mut input, &mut header)? {
        let request = Request::read(&header)
            .map_err(|Malformed| io::Error::new(io::ErrorKind::InvalidData, Malformed))?;
        received.resize(request.payload_bytes, 0);
        input.read_exact(&mut received)?;
        due.clear();
        if request.kind == Kind::Echo {
            let length = payload_length(request.connection, request.number);
            payload(request.connection, request.number, length, &mut due);
        }
        session.judge(&request, received == due, counters);

        if request.kind == Kind::Stat {
            received = serde_json::to_vec(&counters.stat())?;
        }
        session.replies += 1;
        reply.clear();
        Reply {
            kind: request.kind,
            connection: request.connection,
            number: request.number,
            replies: session.replies,
            lost: session.lost,
            doubled: session.doubled,
            wrong: session.wrong,
            payload_bytes: received.len(),
        }
        .write(&received, &mut reply);
        output.write_all(&reply)?;
    }
    Ok(())
}

impl Session {
    fn judge(&mut self, request: &Request, payload_is_right: bool, counters: &Counters) {
        counters.messages.fetch_add(1, Ordering::Relaxed);
        let connection = *self.connection.get_or_insert(request.connection);
        if connection != request.connection || !payload_is_right {
            self.wrong += 1;
            counters.wrong.fetch_add(1, Ordering::Relaxed);
        }
        if request.number < self.next {
            self.doubled += 1;
            counters.doubled.fetch_add(1, Ordering::Relaxed);
        } else if request.number > self.next {
            let missing = request.number - self.next;
            self.lost = self
                .lost
                .saturating_add(u32::try_from(missing).unwrap_or(u32::MAX));
            counters.lost.fetch_add(missing, Ordering::Relaxed);
        }
        self.next = self.next.max(request.number.saturating_add(1));
    }
}

/// Fills `buffer`, or says `false` when the stream ended before its first byte.
fn filled(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    let mut have = 0;
    while have < buffer.len() {
        match input.read(&mut buffer[have..]) {
            Ok(0) if have == 0 => return Ok(false),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => have += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}
