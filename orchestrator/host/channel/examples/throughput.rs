//! How fast pages go over loopback: `throughput [MIB] [STREAMS] [auto|none|lz4] [PERCENT]`,
//! the last one being how much of a page is random and the rest zeros.

#![allow(
    clippy::unwrap_used,
    reason = "a panic is what a failed measurement is"
)]

use std::{env, fs, net::SocketAddr, path::Path, time::Duration};

use migrate_channel::{Destination, Frame, StandingAgent, StreamOptions, TlsFiles, connect};
use migrate_core::stream::Compress;
use migrate_core::wire::{Hello, Message, PAGE_BYTES, PROTOCOL_VERSION, PageOwner, PageRun};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::time::Instant;

const SOON: Duration = Duration::from_secs(10);

/// Pages of a run: what a round reads at once.
const RUN_PAGES: usize = 256;

fn certificates(directory: &Path) -> TlsFiles {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let write = |name: &str, text: String| {
        let path = directory.join(name);
        fs::write(&path, text).unwrap();
        path
    };
    TlsFiles {
        ca: write("ca.pem", issuer.pem()),
        cert: write("cert.pem", certificate.pem()),
        key: write("key.pem", key.serialize_pem()),
    }
}

fn hello() -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        release: "1".into(),
        hostname: "h".into(),
        migration_id: "m".into(),
    }
}

/// Pages of which so many percent are noise, the rest zeros.
fn pages(percent: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut data = vec![0; RUN_PAGES * PAGE_BYTES];
    for page in data.chunks_exact_mut(PAGE_BYTES) {
        for word in page[..PAGE_BYTES * percent / 100].chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
    data
}

#[tokio::main]
async fn main() {
    let mut arguments = env::args().skip(1);
    let mut number = |default: usize| {
        arguments
            .next()
            .map_or(default, |text| text.parse().unwrap())
    };
    let (mib, streams) = (number(4096), number(2));
    let compress = match arguments.next().as_deref() {
        None | Some("auto") => Compress::Auto,
        Some("none") => Compress::None,
        Some(_) => Compress::Lz4,
    };
    let percent = arguments.next().map_or(100, |text| text.parse().unwrap());
    let further = u32::try_from(streams).unwrap() - 1;

    let directory = tempfile::tempdir().unwrap();
    let files = certificates(directory.path());
    let listen = SocketAddr::from(([127, 0, 0, 1], 0));
    let TlsFiles { ca, cert, key } = files.clone();
    let agent = StandingAgent::bind(listen, &TlsFiles { ca, cert, key }, None)
        .await
        .unwrap();
    let to = Destination::parse(&agent.local_addr().to_string(), Some(files)).unwrap();

    let receiving = tokio::spawn(async move {
        let mut connection = agent.accept(hello()).await.unwrap();
        let expected = connection.further.expect(further).unwrap();
        connection.sender.control(&Message::Prepared).await.unwrap();
        let lanes = tokio::select! {
            lanes = expected.all(SOON) => lanes.unwrap(),
            _ = agent.accept(hello()) => panic!("a second source"),
        };
        assert_eq!(
            connection.receiver.control(SOON).await.unwrap(),
            Message::Streams
        );
        connection.receiver.stripe(lanes).unwrap();
        let mut bytes = 0;
        loop {
            match connection.receiver.next(SOON).await.unwrap() {
                Frame::Pages { data, .. } => bytes += data.len(),
                _ => break bytes,
            }
        }
    });
    let mut connection = connect(&to, hello(), SOON).await.unwrap();
    connection.receiver.control(SOON).await.unwrap();
    let lanes = connection.further.open(further, SOON).await.unwrap();
    connection.sender.control(&Message::Streams).await.unwrap();
    let options = StreamOptions {
        compress,
        limit_bytes_per_s: None,
    };
    connection.sender.stripe(lanes, options).await.unwrap();

    let data = pages(percent);
    let begun = Instant::now();
    for index in 0..mib * (1 << 20) / data.len() {
        let run = PageRun {
            owner: PageOwner::Task(1),
            vaddr: (index * data.len()) as u64,
            pages: RUN_PAGES as u64,
            flags: PageRun::PRESENT,
        };
        connection.sender.pages(&run, &data).await.unwrap();
    }
    connection.sender.control(&Message::Go).await.unwrap();
    let bytes = receiving.await.unwrap();
    let took = begun.elapsed();
    let stats = connection.sender.stream_stats();
    #[allow(
        clippy::cast_precision_loss,
        reason = "three digits are enough for a rate"
    )]
    let rate = bytes as f64 / took.as_secs_f64() / 1e9;
    println!(
        "{streams} streams, {compress:?}, {percent}% noise: {rate:.2} GB/s, {} of {} MiB on the wire, lanes busy {:?} of {took:?}",
        connection.sender.sent_bytes() >> 20,
        bytes >> 20,
        stats.busy,
    );
}
