//! Frames over a pipe in memory with the clock held, and one-time certificates
//! over loopback.

use std::{sync::Arc, time::Duration};

use migrate_core::wire::{
    CONTROL_BYTES_MAX, FRAME_HEADER_BYTES, FrameError, FrameKind, Hello, ImagePiece, Message,
    PAGE_BYTES, PROTOCOL_VERSION, PageOwner, PageRun, encode_header,
};
use proptest::prelude::*;
use rustls::{
    ServerConfig,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    net::{TcpListener, TcpStream},
    time::Instant,
};

use crate::{
    ChannelError, Connection, Frame,
    agent::Door,
    connect::shake_hands,
    connection::{Role, introduce},
    frame::{FrameReader, FrameWriter, STALL_LIMIT},
    tls::{ONE_TIME_NAME, OneTimeIdentity},
};

const SOON: Duration = Duration::from_secs(10);

fn hello(release: &str) -> Hello {
    Hello {
        protocol: PROTOCOL_VERSION,
        release: release.into(),
        hostname: "host\x1b[31m1".into(),
        migration_id: "m1".into(),
    }
}

fn pipe(bytes: usize) -> (FrameWriter<DuplexStream>, FrameReader<DuplexStream>) {
    let (near, far) = duplex(bytes);
    (
        FrameWriter::new(near, "peer".into()),
        FrameReader::new(far, "peer".into()),
    )
}

fn run(pages: usize) -> PageRun {
    PageRun {
        owner: PageOwner::Task(7),
        vaddr: 0x7000_0000,
        pages: pages as u64,
        flags: PageRun::PRESENT,
    }
}

#[derive(Debug, Clone)]
enum Sent {
    Control(String),
    Pages(usize, bool, u8),
    Image(String, bool, Vec<u8>),
    Packet(Vec<u8>),
}

fn any_frame() -> impl Strategy<Value = Sent> {
    prop_oneof![
        ".{0,40}".prop_map(Sent::Control),
        (1..200usize, any::<bool>(), any::<u8>()).prop_map(|(n, p, b)| Sent::Pages(n, p, b)),
        (
            "[a-z]{1,9}-[0-9]{1,4}\\.img",
            any::<bool>(),
            prop::collection::vec(any::<u8>(), 0..5000)
        )
            .prop_map(|(n, l, d)| Sent::Image(n, l, d)),
        prop::collection::vec(any::<u8>(), 0..2000).prop_map(Sent::Packet),
    ]
}

fn current_thread() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn frames_arrive_as_they_were_sent(
        frames in prop::collection::vec(any_frame(), 1..12),
        pipe_bytes in 1..70_000usize,
    ) {
        current_thread().block_on(async {
            let (mut writer, mut reader) = pipe(pipe_bytes);
            let sending = async {
                for frame in &frames {
                    match frame {
                        Sent::Control(reason) => {
                            let reason = reason.clone();
                            writer.control(&Message::Abort { reason }).await.unwrap();
                        }
                        Sent::Pages(pages, present, byte) => {
                            let mut run = run(*pages);
                            let data = vec![*byte; if *present { pages * PAGE_BYTES } else { 0 }];
                            run.flags = if *present { PageRun::PRESENT } else { 1 };
                            writer.pages(&run, &data).await.unwrap();
                        }
                        Sent::Image(name, last, data) => {
                            let piece = ImagePiece { name, last: *last, data };
                            writer.image(piece).await.unwrap();
                        }
                        Sent::Packet(data) => writer.packet(data).await.unwrap(),
                    }
                }
                writer.close().await.unwrap();
                writer.sent_bytes()
            };
            let receiving = async {
                for frame in &frames {
                    match (frame, reader.next(SOON).await.unwrap()) {
                        (Sent::Control(sent), Frame::Control(Message::Abort { reason })) => {
                            assert_eq!(*sent, reason);
                        }
                        (Sent::Pages(pages, present, byte), Frame::Pages { run, data }) => {
                            assert_eq!(run.pages, *pages as u64);
                            assert_eq!(data.len(), if *present { pages * PAGE_BYTES } else { 0 });
                            assert!(data.iter().all(|b| b == byte));
                        }
                        (Sent::Image(name, last, data), Frame::Image { name: n, last: l, data: d }) => {
                            assert_eq!((name, last, data.as_slice()), (&n, &l, &d[..]));
                        }
                        (Sent::Packet(data), Frame::Packet(d)) => assert_eq!(data.as_slice(), &d[..]),
                        (sent, got) => panic!("{sent:?} arrived as {}", got.what()),
                    }
                }
                assert!(matches!(reader.next(SOON).await, Err(ChannelError::Closed { .. })));
                reader.received_bytes()
            };
            let (sent, received) = tokio::join!(sending, receiving);
            assert_eq!(sent, received);
        });
    }

    #[test]
    fn any_bytes_are_frames_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        current_thread().block_on(async {
            let (mut near, far) = duplex(4096);
            near.write_all(&bytes).await.unwrap();
            drop(near);
            let mut reader = FrameReader::new(far, "peer".into());
            while reader.next(SOON).await.is_ok() {}
        });
    }
}

#[tokio::test]
async fn a_large_run_and_a_large_image_are_cut_into_frames() {
    let (mut writer, mut reader) = pipe(1 << 16);
    let data: Vec<u8> = (0..=250).cycle().take(2500 * PAGE_BYTES).collect();
    let (whole, image) = (data.clone(), data.clone());
    let sending = tokio::spawn(async move {
        writer.pages(&run(2500), &whole).await.unwrap();
        let piece = ImagePiece {
            name: "pages-1.img",
            last: true,
            data: &whole,
        };
        writer.image(piece).await.unwrap();
        writer.flush().await.unwrap();
        writer
    });
    let mut joined = Vec::new();
    while joined.len() < data.len() {
        let Frame::Pages { run: part, data } = reader.next(SOON).await.unwrap() else {
            panic!("no pages");
        };
        assert_eq!(part.vaddr, run(1).vaddr + joined.len() as u64);
        joined.extend_from_slice(&data);
    }
    assert_eq!(joined, data);
    joined.clear();
    loop {
        let Frame::Image { last, data, .. } = reader.next(SOON).await.unwrap() else {
            panic!("no image");
        };
        joined.extend_from_slice(&data);
        assert_eq!(last, joined.len() == image.len());
        if last {
            break;
        }
    }
    assert_eq!(joined, image);
    sending.await.unwrap();
}

#[tokio::test]
async fn what_must_not_be_sent_is_refused_and_harms_nothing() {
    let (mut writer, mut reader) = pipe(1 << 16);
    let short = writer.pages(&run(2), &[0; PAGE_BYTES]).await;
    assert!(matches!(short, Err(ChannelError::Frame { .. })));
    let outside = ImagePiece {
        name: "../x.img",
        last: true,
        data: b"",
    };
    let outside = writer.image(outside).await;
    assert!(matches!(outside, Err(ChannelError::Frame { .. })));
    let reason = "x".repeat(CONTROL_BYTES_MAX);
    let large = writer.control(&Message::Abort { reason }).await;
    assert!(matches!(large, Err(ChannelError::Frame { .. })));
    writer.control(&Message::Go).await.unwrap();
    assert_eq!(reader.control(SOON).await.unwrap(), Message::Go);
}

#[tokio::test]
async fn an_oversized_frame_is_refused_by_its_header() {
    let (mut near, far) = duplex(4096);
    let mut header = encode_header(FrameKind::Control, 0).unwrap();
    header[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    near.write_all(&header).await.unwrap();
    let mut reader = FrameReader::new(far, "peer".into());
    // Not a byte of the body was sent: it is not even waited for.
    let error = reader.next(SOON).await.unwrap_err();
    assert!(matches!(
        error,
        ChannelError::Frame {
            source: FrameError::TooLarge { .. },
            ..
        }
    ));
}

#[tokio::test]
async fn a_frame_cut_at_any_byte_is_told_from_a_regular_end() {
    let mut whole = encode_header(FrameKind::Control, 1).unwrap().to_vec();
    whole.push(postcard::to_stdvec(&Message::Go).unwrap()[0]);
    for cut in 0..=whole.len() {
        let (mut near, far) = duplex(64);
        near.write_all(&whole[..cut]).await.unwrap();
        drop(near);
        let mut reader = FrameReader::new(far, "peer".into());
        let first = reader.next(SOON).await;
        match cut {
            0 => assert!(matches!(first, Err(ChannelError::Closed { .. }))),
            _ if cut == whole.len() => assert_eq!(first.unwrap(), Frame::Control(Message::Go)),
            _ => assert!(matches!(first, Err(ChannelError::Truncated { .. }))),
        }
    }
}

#[tokio::test]
async fn bytes_after_a_message_are_refused() {
    let (mut near, far) = duplex(64);
    let mut body = postcard::to_stdvec(&Message::Go).unwrap();
    body.push(0);
    let header = encode_header(FrameKind::Control, body.len()).unwrap();
    near.write_all(&[&header[..], &body].concat())
        .await
        .unwrap();
    let mut reader = FrameReader::new(far, "peer".into());
    let error = reader.control(SOON).await.unwrap_err();
    assert!(matches!(error, ChannelError::Frame { .. }), "{error}");
}

#[tokio::test]
async fn pages_where_a_message_is_due_are_an_error() {
    let (mut writer, mut reader) = pipe(1 << 16);
    writer.pages(&run(1), &[0; PAGE_BYTES]).await.unwrap();
    writer.flush().await.unwrap();
    assert!(matches!(
        reader.control(SOON).await,
        Err(ChannelError::Unexpected { got: "pages", .. })
    ));
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_meets_the_deadline_and_no_byte_is_lost() {
    let (mut near, far) = duplex(64);
    let mut reader = FrameReader::new(far, "peer".into());
    let begun = Instant::now();
    let limit = Duration::from_millis(700);
    assert!(reader.next(limit).await.unwrap_err().is_deadline());
    assert_eq!(begun.elapsed().as_millis(), 700);
    // Half a frame, another deadline, and the rest.
    let header = encode_header(FrameKind::Control, 1).unwrap();
    near.write_all(&header).await.unwrap();
    assert!(reader.next(limit).await.unwrap_err().is_deadline());
    near.write_all(&postcard::to_stdvec(&Message::Go).unwrap())
        .await
        .unwrap();
    assert_eq!(reader.control(limit).await.unwrap(), Message::Go);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_nothing_meets_the_stall_limit() {
    let (mut writer, _reader) = pipe(1000);
    let begun = Instant::now();
    let error = writer.pages(&run(1000), &vec![0; 1000 * PAGE_BYTES]).await;
    assert!(error.unwrap_err().is_deadline());
    assert_eq!(begun.elapsed(), STALL_LIMIT);
    // What would follow would be misread.
    let error = writer.control(&Message::Go).await.unwrap_err();
    assert!(matches!(error, ChannelError::HalfWritten { .. }));
}

#[tokio::test(start_paused = true)]
async fn a_slow_peer_is_not_a_dead_one() {
    let (near, mut far) = duplex(64 << 10);
    let mut writer = FrameWriter::new(near, "peer".into());
    writer.set_stall_limit(Duration::from_secs(5));
    let taking = tokio::spawn(async move {
        let mut piece = vec![0; 64 << 10];
        let mut taken = 0;
        while let Ok(got @ 1..) = far.read(&mut piece).await {
            taken += got;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        taken
    });
    // A minute in all, never five seconds for one piece.
    let data = vec![0; 1000 * PAGE_BYTES];
    writer.pages(&run(1000), &data).await.unwrap();
    writer.close().await.unwrap();
    let heads = FRAME_HEADER_BYTES + run(1).encode().len();
    assert_eq!(taking.await.unwrap(), data.len() + heads);
}

#[tokio::test]
async fn a_cancelled_send_poisons_the_sender() {
    let (mut writer, mut reader) = pipe(1000);
    let (run, data) = (run(1000), vec![0; 1000 * PAGE_BYTES]);
    tokio::select! {
        biased;
        _ = writer.pages(&run, &data) => panic!("nobody reads"),
        () = tokio::task::yield_now() => {}
    }
    let error = writer.control(&Message::Go).await.unwrap_err();
    assert!(matches!(error, ChannelError::HalfWritten { .. }));
    // The peer hears of the end although this end keeps the connection.
    writer.close().await.unwrap();
    let error = reader.next(SOON).await.unwrap_err();
    assert!(error.is_disconnect(), "{error}");
}

async fn introduce_both(source: Hello, destination: Hello) -> [Result<Hello, ChannelError>; 2] {
    let (near, far) = duplex(4096);
    let ends_at = Instant::now() + SOON;
    let side = |stream: DuplexStream, role, hello| async move {
        let (read, write) = tokio::io::split(stream);
        let mut reader = FrameReader::new(read, "peer".into());
        let mut writer = FrameWriter::new(write, "peer".into());
        introduce(&mut reader, &mut writer, "peer", role, hello, ends_at).await
    };
    let (a, b) = tokio::join!(
        side(near, Role::Source, source),
        side(far, Role::Destination, destination)
    );
    [a, b]
}

#[tokio::test]
async fn another_version_is_named_on_both_sides() {
    let mut other_protocol = hello("1");
    other_protocol.protocol += 1;
    for other in [hello("2"), other_protocol] {
        for (source, destination) in [(hello("1"), other.clone()), (other, hello("1"))] {
            for result in introduce_both(source, destination).await {
                let error = result.unwrap_err();
                let ChannelError::Version { ours, theirs, .. } = &error else {
                    panic!("{error}");
                };
                assert_ne!(ours, theirs);
                assert!(error.help().unwrap().contains("same release"));
            }
        }
    }
}

#[tokio::test]
async fn a_destination_takes_the_identifier_of_the_migration() {
    let mut nameless = hello("1");
    nameless.migration_id.clear();
    let [seen_by_source, seen_by_destination] = introduce_both(hello("1"), nameless).await;
    assert_eq!(seen_by_source.unwrap().migration_id, "m1");
    assert_eq!(seen_by_destination.unwrap().migration_id, "m1");
}

#[tokio::test]
async fn something_else_than_an_introduction_is_refused() {
    let (near, far) = duplex(4096);
    let (read, write) = tokio::io::split(far);
    let mut reader = FrameReader::new(read, "peer".into());
    let mut writer = FrameWriter::new(write, "peer".into());
    let mut rude = FrameWriter::new(near, "peer".into());
    rude.control(&Message::Go).await.unwrap();
    let ends_at = Instant::now() + SOON;
    let role = Role::Destination;
    let result = introduce(&mut reader, &mut writer, "peer", role, hello("1"), ends_at);
    assert!(matches!(result.await, Err(ChannelError::Unexpected { .. })));
}

// ---- one-time certificates ----

async fn door(server: OneTimeIdentity, client: CertificateDer<'static>) -> Door {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    Door::new(listener, server.server(client).unwrap()).unwrap()
}

async fn pair() -> (Connection, Connection) {
    let (server, client) = identities();
    let (pinned, expected) = (server.certificate.clone(), client.certificate.clone());
    let mut door = door(server, expected).await;
    let address = door.local_addr;
    let ours = hello("1");
    let (source, destination) = tokio::join!(knock_at(address, client, pinned), door.next(&ours));
    (source.unwrap(), destination.unwrap())
}

fn identities() -> (OneTimeIdentity, OneTimeIdentity) {
    (
        OneTimeIdentity::generate().unwrap(),
        OneTimeIdentity::generate().unwrap(),
    )
}

#[tokio::test]
async fn known_certificates_meet_and_talk_both_ways() {
    let (mut source, mut destination) = pair().await;
    assert_eq!(source.local_addr, destination.peer_addr);
    assert_eq!(source.peer_addr, destination.local_addr);
    // A hostile host name does not reach the terminal.
    assert!(!source.peer.to_string().contains('\x1b'));
    let data = vec![0xa5; 4000 * PAGE_BYTES];
    let sending = async {
        source.sender.pages(&run(4000), &data).await.unwrap();
        source.sender.control(&Message::Go).await.unwrap();
        source.receiver.control(SOON).await.unwrap()
    };
    let receiving = async {
        let mut pages = 0;
        loop {
            match destination.receiver.next(SOON).await.unwrap() {
                Frame::Pages { run, data } => {
                    assert!(data.iter().all(|b| *b == 0xa5));
                    pages += run.pages;
                }
                Frame::Control(Message::Go) => break,
                other => panic!("{}", other.what()),
            }
        }
        destination.sender.control(&Message::Owned).await.unwrap();
        pages
    };
    let (answer, pages) = tokio::join!(sending, receiving);
    assert_eq!((answer, pages), (Message::Owned, 4000));
    // A regular end, and the end of a process, are both the end.
    source.sender.close().await.unwrap();
    let error = destination.receiver.next(SOON).await.unwrap_err();
    assert!(matches!(error, ChannelError::Closed { .. }), "{error}");
    drop(destination);
    let error = source.receiver.next(SOON).await.unwrap_err();
    assert!(error.is_disconnect(), "{error}");
}

#[tokio::test]
async fn a_server_with_another_certificate_is_refused() {
    let (server, client) = identities();
    let (other, _) = identities();
    let mut door = door(server, client.certificate.clone()).await;
    let ours = hello("1");
    let error = tokio::select! {
        refused = knock_at(door.local_addr, client, other.certificate) => refused.unwrap_err(),
        _ = door.next(&ours) => panic!("accepted"),
    };
    assert!(matches!(error, ChannelError::Handshake { .. }), "{error}");
    assert!(error.help().is_some());
}

#[tokio::test]
async fn a_client_with_another_certificate_is_refused_and_the_right_one_still_served() {
    let (server, client) = identities();
    let (other, _) = identities();
    let pinned = server.certificate.clone();
    let mut door = door(server, client.certificate.clone()).await;
    let address = door.local_addr;
    // A stranger that says nothing must not be in the way either.
    let _silent = TcpStream::connect(address).await.unwrap();
    let ours = hello("1");
    let visits = async {
        let refused = knock_at(address, other, pinned.clone()).await.unwrap_err();
        assert!(
            matches!(refused, ChannelError::Handshake { .. }),
            "{refused}"
        );
        knock_at(address, client, pinned).await.unwrap()
    };
    let (_source, accepted) = tokio::join!(visits, door.next(&ours));
    accepted.unwrap();
}

async fn knock_at(
    address: std::net::SocketAddr,
    client: OneTimeIdentity,
    server: CertificateDer<'static>,
) -> Result<Connection, ChannelError> {
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from(ONE_TIME_NAME).unwrap();
    let config = client.client(server).unwrap();
    shake_hands(tcp, name, config, hello("1"), Instant::now() + SOON).await
}

/// Shows a certificate and signs with a key that is not its own.
#[derive(Debug)]
struct Thief(Arc<CertifiedKey>);

impl ResolvesServerCert for Thief {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

#[tokio::test]
async fn the_right_certificate_without_its_key_is_refused() {
    let (server, client) = identities();
    let other = rcgen::KeyPair::generate().unwrap();
    let other = PrivatePkcs8KeyDer::from(other.serialize_der()).into();
    let key = rustls::crypto::ring::sign::any_supported_type(&other).unwrap();
    let stolen = CertifiedKey::new(vec![server.certificate.clone()], key);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Thief(Arc::new(stolen))));
    config.alpn_protocols = vec![b"migrate".to_vec()];
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut door = Door::new(listener, Arc::new(config)).unwrap();
    let ours = hello("1");
    let error = tokio::select! {
        refused = knock_at(door.local_addr, client, server.certificate) => refused.unwrap_err(),
        _ = door.next(&ours) => panic!("accepted"),
    };
    assert!(error.to_string().contains("handshake"), "{error}");
    let cause = std::error::Error::source(&error).unwrap().to_string();
    assert!(cause.contains("BadSignature"), "{cause}");
}

#[tokio::test]
async fn plain_text_is_refused() {
    let (server, client) = identities();
    let mut door = door(server, client.certificate).await;
    let mut tcp = TcpStream::connect(door.local_addr).await.unwrap();
    let body = postcard::to_stdvec(&Message::Hello(hello("1"))).unwrap();
    let header = encode_header(FrameKind::Control, body.len()).unwrap();
    tcp.write_all(&[&header[..], &body].concat()).await.unwrap();
    let mut answer = Vec::new();
    let ours = hello("1");
    tokio::select! {
        ended = tcp.read_to_end(&mut answer) => drop(ended),
        _ = door.next(&ours) => panic!("accepted"),
    }
    // At most an alert of TLS, which is a record of seven bytes.
    assert!(answer.len() <= 7, "{answer:?}");
}

#[tokio::test]
async fn a_known_peer_that_misbehaves_ends_the_wait_of_an_agent_behind_ssh() {
    let (server, client) = identities();
    let pinned = server.certificate.clone();
    let mut door = door(server, client.certificate.clone()).await;
    door.strangers_expected = false;
    let address = door.local_addr;
    let ours = hello("2");
    let (source, destination) = tokio::join!(knock_at(address, client, pinned), door.next(&ours));
    assert!(matches!(source, Err(ChannelError::Version { .. })));
    assert!(matches!(destination, Err(ChannelError::Version { .. })));
}
