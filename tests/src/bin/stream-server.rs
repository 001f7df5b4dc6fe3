//! Connections that only one side fills, or that last for one request: see
//! `migrate_tests::streams` for what is spoken. One thread each.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Parser;
use migrate_tests::streams::wire::{self, Numbers, Tally};
use nix::sys::socket::{self, Backlog};

/// As in `echo-server`.
const STACK_BYTES: usize = 256 * 1024;

/// One-sided streams and connections for one request, one thread each.
#[derive(Debug, Parser)]
struct Arguments {
    /// Addresses and ports to listen on, IPv4 or IPv6.
    #[arg(required = true)]
    listen: Vec<SocketAddr>,
    /// Accept nothing: connections wait in the kernel.
    #[arg(long)]
    deaf: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut threads = Vec::new();
    for listen in arguments.listen {
        let listener = match listener(listen) {
            Ok(listener) => listener,
            Err(error) => {
                eprintln!("stream-server: could not listen on {listen}: {error}");
                return ExitCode::FAILURE;
            }
        };
        let deaf = arguments.deaf;
        threads.push(thread::spawn(move || accept_forever(&listener, deaf)));
    }
    for thread in threads {
        // None of them ends but by a failure, which it has told.
        let _ = thread.join();
    }
    ExitCode::FAILURE
}

fn listener(listen: SocketAddr) -> io::Result<TcpListener> {
    let listener = TcpListener::bind(listen)?;
    socket::listen(&listener, Backlog::MAXCONN)?;
    Ok(listener)
}

fn accept_forever(listener: &TcpListener, deaf: bool) {
    if deaf {
        loop {
            thread::park();
        }
    }
    loop {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
                ) =>
            {
                continue;
            }
            Err(error) => {
                eprintln!("stream-server: could not accept: {error}");
                return;
            }
        };
        let served = thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if let Err(error) = serve(stream) {
                    eprintln!("stream-server: connection ended: {error}");
                }
            });
        if let Err(error) = served {
            eprintln!("stream-server: could not start a thread: {error}");
            return;
        }
    }
}

fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (kind, number) = wire::read_head(&mut stream)?;
    match kind {
        wire::UPLOAD => {
            let mut came = Tally::default();
            io::copy(&mut stream, &mut came)?;
            stream.write_all(&came.receipt().bytes())
        }
        wire::DOWNLOAD => download(stream, number),
        wire::REQUEST => reply(&mut stream, number, wire::REPLY_BYTES),
        wire::BIG_REQUEST => reply(&mut stream, number, wire::BIG_REPLY_BYTES),
        wire::POLITE_REQUEST => {
            reply(&mut stream, number, wire::REPLY_BYTES)?;
            stream.read_to_end(&mut Vec::new()).map(drop)
        }
        wire::HALF_CLOSED => {
            let (mut numbers, mut chunk) = (Numbers::new(number), vec![0; wire::HALF_CHUNK_BYTES]);
            stream.read_to_end(&mut Vec::new())?;
            for _ in 0..wire::HALF_CHUNKS {
                numbers.fill(&mut chunk);
                stream.write_all(&chunk)?;
                thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        }
        other => Err(io::Error::other(format!("no such request: {other}"))),
    }
}

/// The end of the caller closes the connection.
fn reply(stream: &mut TcpStream, number: u64, bytes: usize) -> io::Result<()> {
    let mut reply = vec![0; bytes];
    Numbers::new(number).fill(&mut reply);
    stream.write_all(&reply)
}

/// Sends until the peer closes its side, then says what was sent.
fn download(mut stream: TcpStream, number: u64) -> io::Result<()> {
    let mut other_side = stream.try_clone()?;
    let waiting = thread::Builder::new()
        .stack_size(STACK_BYTES)
        .spawn(move || other_side.read_to_end(&mut Vec::new()))?;
    let (mut numbers, mut sent) = (Numbers::new(number), Tally::default());
    let mut chunk = vec![0; 64 * 1024];
    while !waiting.is_finished() {
        numbers.fill(&mut chunk);
        sent.write_all(&chunk)?;
        stream.write_all(&chunk)?;
    }
    stream.write_all(&sent.receipt().bytes())
}
