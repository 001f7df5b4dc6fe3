//! A multi-threaded TCP echo whose state is all in memory.
//!
//! One thread accepts, one serves each connection. The counters of a
//! connection live on its thread's stack, so a copy of this process that
//! forgot or repeated anything contradicts its client at once.

use std::io::{self, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

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
    match accept_forever(arguments.listen) {
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
