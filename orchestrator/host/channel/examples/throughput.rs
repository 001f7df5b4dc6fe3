//! How fast pages move through the channel on one machine:
//! `cargo run --release -p migrate-channel --example throughput`.

use std::{
    error::Error,
    fs,
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use migrate_channel::{Destination, Frame, StandingAgent, TlsFiles, connect};
use migrate_core::wire::{Hello, PAGE_BYTES, PROTOCOL_VERSION, PageOwner, PageRun};

const LIMIT: Duration = Duration::from_secs(30);
const TOTAL_BYTES: usize = 4 << 30;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let directory = tempfile::tempdir()?;
    // One certificate that is its own authority, for both sides.
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()])?;
    let (cert, key) = (
        directory.path().join("cert.pem"),
        directory.path().join("key.pem"),
    );
    fs::write(&cert, made.cert.pem())?;
    fs::write(&key, made.signing_key.serialize_pem())?;
    let files = TlsFiles {
        ca: cert.clone(),
        cert: cert.clone(),
        key: key.clone(),
    };
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let agent = StandingAgent::bind(listen, cert.clone(), cert, key).await?;
    let destination = Destination::parse(&agent.local_addr().to_string(), Some(files))?;
    let hello = Hello {
        protocol: PROTOCOL_VERSION,
        release: env!("CARGO_PKG_VERSION").into(),
        hostname: "localhost".into(),
        migration_id: "throughput".into(),
    };
    let (source, accepted) = tokio::join!(
        connect(&destination, hello.clone(), LIMIT),
        agent.accept(hello)
    );
    let (mut source, mut accepted) = (source?, accepted?);
    for pages in [1, 16, 256, 1024] {
        let run = PageRun {
            owner: PageOwner::Task(1),
            vaddr: 0,
            pages,
            flags: PageRun::PRESENT,
        };
        let data = vec![0xa5; usize::try_from(run.data_bytes())?];
        let frames = TOTAL_BYTES / 4 / data.len();
        let begun = Instant::now();
        let sending = tokio::spawn(async move {
            for _ in 0..frames {
                source.sender.pages(&run, &data).await?;
            }
            source.sender.flush().await.map(|()| source)
        });
        let mut received = 0;
        while received < frames * usize::try_from(pages)? * PAGE_BYTES {
            if let Frame::Pages { data, .. } = accepted.receiver.next(LIMIT).await? {
                received += data.len();
            }
        }
        source = sending.await??;
        let megabytes = f64::from(u32::try_from(received >> 20)?);
        println!(
            "{pages:5} pages a frame: {:6.0} MiB/s",
            megabytes / begun.elapsed().as_secs_f64()
        );
    }
    Ok(())
}
