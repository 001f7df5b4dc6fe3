//! Frames over a pipe in memory with the clock held, and one-time certificates
//! over loopback.

use std::{sync::Arc, time::Duration};

use migrate_core::stream::Compress;
use migrate_core::wire::{
    CONTROL_BYTES_MAX, FRAME_BODY_BYTES_MAX, FRAME_HEADER_BYTES, FrameError, FrameKind, Hello,
    ImagePiece, Message, PACKET_BYTES_MAX, PAGE_BYTES, PROTOCOL_VERSION, PageOwner, PageRun,
    encode_header,
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
    agent::{Door, HANDSHAKES_MAX},
    connect::shake_hands,
    connection::{First, answer, introduce, receive_first},
    frame::{FrameReader, FrameWriter, STALL_LIMIT},
    lanes::StreamOptions,
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

/// Writers and readers of several pipes, joined to one stream.
async fn lanes(
    count: usize,
    pipe_bytes: usize,
    options: StreamOptions,
) -> (FrameWriter<DuplexStream>, FrameReader<DuplexStream>) {
    let (mut writer, mut reader) = pipe(pipe_bytes);
    let (out, into) = (1..count).map(|_| duplex(pipe_bytes)).unzip();
    writer.stripe(out, options).await.unwrap();
    reader.stripe(into).unwrap();
    (writer, reader)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Runs of any size, over any number of lanes, arrive in their order; then
    /// the first lane goes on alone.
    #[test]
    fn a_stream_over_several_lanes_keeps_its_order(
        count in 1..5usize,
        runs in prop::collection::vec((1..300usize, any::<bool>(), any::<u8>()), 1..30),
        pipe_bytes in 1000..70_000usize,
        lz4: bool,
    ) {
        current_thread().block_on(async {
            let compress = if lz4 { Compress::Lz4 } else { Compress::None };
            let options = StreamOptions { compress, ..StreamOptions::default() };
            let (mut writer, mut reader) = lanes(count, pipe_bytes, options).await;
            let noise: Vec<u8> = (0..1200 * PAGE_BYTES as u64)
                .map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
                .collect();
            let content = |pages: usize, noisy: bool, byte: u8| {
                if noisy {
                    noise[usize::from(byte)..][..pages * PAGE_BYTES].to_vec()
                } else {
                    vec![byte; pages * PAGE_BYTES]
                }
            };
            let sending = async {
                for &(pages, noisy, byte) in &runs {
                    writer.pages(&run(pages), &content(pages, noisy, byte)).await.unwrap();
                    if byte % 2 == 0 {
                        // Goes at once, in a batch that is not full.
                        writer.control(&Message::Prepared).await.unwrap();
                    }
                }
                writer.control(&Message::Frozen).await.unwrap();
                writer.unstripe().await.unwrap();
                writer.control(&Message::Go).await.unwrap();
                writer.sent_bytes()
            };
            let receiving = async {
                for &(pages, noisy, byte) in &runs {
                    let Frame::Pages { run, data } = reader.next(SOON).await.unwrap() else {
                        panic!("no pages");
                    };
                    assert_eq!(run.pages, pages as u64);
                    assert!(data == content(pages, noisy, byte));
                    if byte % 2 == 0 {
                        assert_eq!(reader.control(SOON).await.unwrap(), Message::Prepared);
                    }
                }
                assert_eq!(reader.control(SOON).await.unwrap(), Message::Frozen);
                reader.unstripe(SOON).await.unwrap();
                assert_eq!(reader.control(SOON).await.unwrap(), Message::Go);
                reader.received_bytes()
            };
            let (sent, received) = tokio::join!(sending, receiving);
            // What was compressed is counted as it went.
            assert!(if lz4 { sent <= received } else { sent == received });
        });
    }

    #[test]
    fn any_bytes_are_batches_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        current_thread().block_on(async {
            let (mut near, far) = duplex(4096);
            near.write_all(&bytes).await.unwrap();
            drop(near);
            let mut reader = FrameReader::new(far, "peer".into());
            reader.stripe(Vec::new()).unwrap();
            while reader.next(SOON).await.is_ok() {}
        });
    }
}

#[tokio::test]
async fn pages_with_little_in_them_take_little_when_compressed() {
    let options = StreamOptions {
        compress: Compress::Lz4,
        ..StreamOptions::default()
    };
    let (mut writer, mut reader) = lanes(2, 64 << 10, options).await;
    let data = vec![7; 1000 * PAGE_BYTES];
    let sending = async {
        writer.pages(&run(1000), &data).await.unwrap();
        writer.flush().await.unwrap();
        writer.sent_bytes()
    };
    let receiving = async {
        let mut pages = 0;
        while pages < 1000 {
            if let Frame::Pages { run, .. } = reader.next(SOON).await.unwrap() {
                pages += run.pages;
            }
        }
    };
    let (sent, ()) = tokio::join!(sending, receiving);
    assert!(sent < data.len() as u64 / 20, "{sent}");
}

#[tokio::test]
async fn the_loss_of_one_lane_is_the_end_of_the_stream() {
    for lost in [0, 1] {
        let (mut writer, reader) = pipe(1 << 16);
        let (second, far) = duplex(1 << 16);
        writer
            .stripe(vec![second], StreamOptions::default())
            .await
            .unwrap();
        let mut ends = [Some(reader.into_stream().unwrap()), Some(far)];
        ends[lost] = None;
        let mut left = ends.into_iter().flatten().next().unwrap();
        let taking =
            tokio::spawn(async move { tokio::io::copy(&mut left, &mut tokio::io::sink()).await });
        let data = vec![1; 4000 * PAGE_BYTES];
        let error = async {
            writer.pages(&run(4000), &data).await?;
            writer.flush().await
        }
        .await
        .unwrap_err();
        assert!(error.is_disconnect(), "{error}");
        // The other lane's peer hears of it.
        writer.close().await.unwrap();
        taking.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_destination_that_misses_a_lane_does_not_wait_for_it() {
    let (mut writer, mut reader) = pipe(1 << 16);
    let (second, far) = duplex(1 << 16);
    writer
        .stripe(vec![second], StreamOptions::default())
        .await
        .unwrap();
    let (elsewhere, other) = duplex(64);
    drop((elsewhere, far));
    reader.stripe(vec![other]).unwrap();
    let data = vec![1; 200 * PAGE_BYTES];
    let _ = writer.pages(&run(200), &data).await;
    let error = reader.next(SOON).await.unwrap_err();
    assert!(matches!(error, ChannelError::Truncated { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_lane_that_takes_nothing_meets_the_stall_limit() {
    let (mut writer, _reader) = pipe(1000);
    writer
        .stripe(Vec::new(), StreamOptions::default())
        .await
        .unwrap();
    let begun = Instant::now();
    let error = async {
        writer
            .pages(&run(1000), &vec![0; 1000 * PAGE_BYTES])
            .await?;
        writer.flush().await
    }
    .await;
    assert!(error.unwrap_err().is_deadline());
    assert_eq!(begun.elapsed(), STALL_LIMIT);
    let error = writer.control(&Message::Go).await.unwrap_err();
    assert!(matches!(error, ChannelError::HalfWritten { .. }));
}

#[tokio::test(start_paused = true)]
async fn a_limited_stream_takes_its_time_until_the_limit_goes() {
    let options = StreamOptions {
        compress: Compress::None,
        limit_bytes_per_s: Some(1_000_000),
    };
    let (mut writer, mut reader) = lanes(2, 1 << 16, options).await;
    let data = vec![1; 1000 * PAGE_BYTES];
    let begun = Instant::now();
    let taking = tokio::spawn(async move { while reader.next(SOON).await.is_ok() {} });
    writer.pages(&run(1000), &data).await.unwrap();
    writer.flush().await.unwrap();
    let limited = begun.elapsed();
    assert!((4.0..4.2).contains(&limited.as_secs_f64()), "{limited:?}");
    writer.set_limit(None);
    writer.pages(&run(1000), &data).await.unwrap();
    writer.flush().await.unwrap();
    assert_eq!(begun.elapsed(), limited);
    drop(writer);
    taking.await.unwrap();
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

/// One whole frame of each kind, as it stands on the wire.
async fn one_of_each() -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    for kind in 0..4 {
        let (near, mut far) = duplex(1 << 16);
        let mut writer = FrameWriter::new(near, "peer".into());
        match kind {
            0 => {
                writer
                    .control(&Message::Verdict {
                        migration_id: "m1".into(),
                    })
                    .await
            }
            1 => writer.pages(&run(1), &[7; PAGE_BYTES]).await,
            2 => {
                let (name, data) = ("core-7.img", &b"data"[..]);
                writer
                    .image(ImagePiece {
                        name,
                        last: true,
                        data,
                    })
                    .await
            }
            _ => writer.packet(&[7; 66]).await,
        }
        .unwrap();
        writer.close().await.unwrap();
        let mut frame = Vec::new();
        far.read_to_end(&mut frame).await.unwrap();
        frames.push(frame);
    }
    frames
}

#[tokio::test]
async fn every_kind_cut_at_each_byte_is_told_from_a_whole_one() {
    for whole in one_of_each().await {
        for cut in 0..=whole.len() {
            let (mut near, far) = duplex(1 << 16);
            near.write_all(&whole[..cut]).await.unwrap();
            drop(near);
            let mut reader = FrameReader::new(far, "peer".into());
            let first = reader.next(SOON).await;
            match cut {
                0 => assert!(matches!(first, Err(ChannelError::Closed { .. }))),
                _ if cut == whole.len() => assert!(first.is_ok(), "{first:?}"),
                _ => assert!(
                    matches!(first, Err(ChannelError::Truncated { .. })),
                    "{cut}"
                ),
            }
        }
    }
}

#[tokio::test]
async fn every_kind_is_bounded_from_nothing_to_its_most() {
    for (kind, most) in [
        (FrameKind::Control, CONTROL_BYTES_MAX),
        (FrameKind::Pages, FRAME_BODY_BYTES_MAX),
        (FrameKind::Image, FRAME_BODY_BYTES_MAX),
        (FrameKind::Packet, PACKET_BYTES_MAX),
    ] {
        for bytes in [0, most, most + 1] {
            let mut header = encode_header(kind, 0).unwrap();
            header[..4].copy_from_slice(&u32::try_from(bytes).unwrap().to_le_bytes());
            let (mut near, far) = duplex(1 << 16);
            let mut reader = FrameReader::new(far, "peer".into());
            let sending = async {
                near.write_all(&header).await.unwrap();
                // A reader that has seen enough does not take the rest.
                let _ = near.write_all(&vec![0xff; bytes.min(most)]).await;
                drop(near);
            };
            let receiving = async {
                let first = reader.next(SOON).await;
                drop(reader);
                first
            };
            let ((), first) = tokio::join!(sending, receiving);
            // Anything may be a packet; all else has a form that this is not.
            let whole = kind == FrameKind::Packet && bytes <= most;
            match first {
                Ok(Frame::Packet(packet)) => assert!(whole && packet.len() == bytes),
                other => {
                    let refused = matches!(
                        other,
                        Err(ChannelError::Frame { .. } | ChannelError::Message { .. })
                    );
                    assert!(!whole && refused, "{kind:?} of {bytes}: {other:?}");
                }
            }
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

/// Whatever it sends, byte by byte: the deadline is that of the whole frame.
#[tokio::test(start_paused = true)]
async fn a_peer_that_sends_byte_by_byte_meets_the_deadline() {
    let body = postcard::to_stdvec(&Message::Hello(hello("1"))).unwrap();
    let header = encode_header(FrameKind::Control, body.len()).unwrap();
    let all = [&header[..], &body].concat();
    assert!(all.len() > 20, "more than what comes in the time");
    let (mut near, far) = duplex(4096);
    let mut reader = FrameReader::new(far, "peer".into());
    let sending = tokio::spawn(async move {
        for byte in all {
            near.write_all(&[byte]).await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        near
    });
    let begun = Instant::now();
    let error = receive_first(&mut reader, "peer", begun + SOON)
        .await
        .unwrap_err();
    assert!(error.is_deadline(), "{error}");
    assert!(
        error.to_string().contains("peer to introduce itself"),
        "{error}"
    );
    assert_eq!(begun.elapsed(), SOON);
    // Nothing is wrong with the frame but its sender.
    let late = receive_first(&mut reader, "peer", begun + 60 * SOON).await;
    assert!(matches!(late, Ok(First::Hello(_))));
    drop(sending.await);
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
    let ends = |stream: DuplexStream| {
        let (read, write) = tokio::io::split(stream);
        (
            FrameReader::new(read, "peer".into()),
            FrameWriter::new(write, "peer".into()),
        )
    };
    let (mut reader, mut writer) = ends(near);
    let (mut far_reader, mut far_writer) = ends(far);
    let (a, b) = tokio::join!(
        introduce(&mut reader, &mut writer, "peer", source, ends_at),
        async {
            match receive_first(&mut far_reader, "peer", ends_at).await? {
                First::Hello(theirs) => answer(&mut far_writer, "peer", destination, theirs).await,
                First::Join(_) => panic!("no introduction"),
            }
        }
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
    let mut reader = FrameReader::new(far, "peer".into());
    let mut rude = FrameWriter::new(near, "peer".into());
    rude.control(&Message::Go).await.unwrap();
    let ends_at = Instant::now() + SOON;
    let result = receive_first(&mut reader, "peer", ends_at).await;
    assert!(matches!(result, Err(ChannelError::Unexpected { .. })));
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
async fn further_connections_join_once_and_carry_pages() {
    let (server, client) = identities();
    let (pinned, expected) = (server.certificate.clone(), client.certificate.clone());
    let mut door = door(server, expected).await;
    let address = door.local_addr;
    let ours = hello("1");
    let (source, destination) = tokio::join!(knock_at(address, client, pinned), door.next(&ours));
    let (mut source, mut destination) = (source.unwrap(), destination.unwrap());
    destination.further.keep(door, ours);
    let expected = destination.further.expect(2).unwrap();
    // The same tokens a second time, and those that are not expected, open
    // nothing.
    let (again, more) = (source.further.clone(), source.further.clone());
    let (lanes, all) = tokio::join!(source.further.open(2, SOON), expected.all_and_keep(SOON));
    let (lanes, (all, _open)) = (lanes.unwrap(), all.unwrap());
    assert_eq!((lanes.len(), all.len()), (2, 2));
    let error = again.open(2, SOON).await.unwrap_err();
    assert!(error.is_disconnect(), "{error}");
    let error = more.open(3, SOON).await.unwrap_err();
    assert!(error.is_disconnect(), "{error}");

    source.sender.control(&Message::Streams).await.unwrap();
    source
        .sender
        .stripe(lanes, StreamOptions::default())
        .await
        .unwrap();
    let data = vec![0xa5; 4000 * PAGE_BYTES];
    let sending = async {
        source.sender.pages(&run(4000), &data).await.unwrap();
        source.sender.control(&Message::Frozen).await.unwrap();
        source.sender.unstripe().await.unwrap();
        source.sender.control(&Message::Go).await.unwrap();
    };
    let receiving = async {
        let streams = destination.receiver.control(SOON).await.unwrap();
        assert_eq!(streams, Message::Streams);
        destination.receiver.stripe(all).unwrap();
        let mut pages = 0;
        while let Frame::Pages { run, .. } = destination.receiver.next(SOON).await.unwrap() {
            pages += run.pages;
        }
        destination.receiver.unstripe(SOON).await.unwrap();
        let go = destination.receiver.control(SOON).await.unwrap();
        assert_eq!((pages, go), (4000, Message::Go));
    };
    tokio::join!(sending, receiving);
}

#[tokio::test]
async fn a_migration_s_tokens_are_its_own() {
    let (a, b) = (pair().await, pair().await);
    assert_eq!(a.0.further.all_tokens(), a.1.further.all_tokens());
    let mut seen = std::collections::BTreeSet::new();
    for token in
        a.0.further
            .all_tokens()
            .iter()
            .chain(b.0.further.all_tokens())
    {
        assert!(seen.insert(*token));
    }
    assert_eq!(seen.len(), 32);
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

/// They are always about to say something, and take every place there is.
#[tokio::test]
async fn strangers_who_speak_byte_by_byte_are_not_waited_for() {
    /// A record of TLS of the full length, of which the contents never end.
    const RECORD: [u8; 5] = [22, 3, 1, 0x40, 0];
    let (server, client) = identities();
    let pinned = server.certificate.clone();
    let mut door = door(server, client.certificate.clone()).await;
    let address = door.local_addr;
    let mut strangers = tokio::task::JoinSet::new();
    for _ in 0..HANDSHAKES_MAX {
        let mut tcp = TcpStream::connect(address).await.unwrap();
        strangers.spawn(async move {
            let mut next = RECORD.into_iter().chain(std::iter::repeat(1));
            // Until the agent has had enough.
            while tcp.write_all(&[next.next().unwrap()]).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
    }
    let ours = hello("1");
    let patient = Instant::now() + 6 * SOON;
    let visit = async {
        let knocked = knock_until(patient, address, client, pinned).await;
        // Nobody has been let in, and all of them have been sent away.
        while strangers.join_next().await.is_some() {}
        knocked
    };
    let (source, accepted) = tokio::join!(visit, door.next(&ours));
    assert_eq!(
        accepted.unwrap().hello.hostname,
        source.unwrap().hello.hostname
    );
}

async fn knock_at(
    address: std::net::SocketAddr,
    client: OneTimeIdentity,
    server: CertificateDer<'static>,
) -> Result<Connection, ChannelError> {
    knock_until(Instant::now() + SOON, address, client, server).await
}

async fn knock_until(
    ends_at: Instant,
    address: std::net::SocketAddr,
    client: OneTimeIdentity,
    server: CertificateDer<'static>,
) -> Result<Connection, ChannelError> {
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from(ONE_TIME_NAME).unwrap();
    let config = client.client(server).unwrap();
    shake_hands(tcp, name, config, hello("1"), ends_at).await
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

#[tokio::test]
async fn a_pair_within_the_process_speaks_as_a_connection_does() {
    let (mut source, mut directory) = Connection::pair(hello("1.0.0"), hello("1.0.0"));
    let run = PageRun {
        owner: PageOwner::Task(7),
        vaddr: 0x1000,
        pages: 300,
        flags: PageRun::PRESENT,
    };
    // More than fits on the way at once.
    let data = vec![7; 300 * PAGE_BYTES];
    let expected = data.clone();
    let limit = Duration::from_secs(10);
    let sending = async {
        let lanes = source.further.open(0, limit).await.unwrap();
        source.sender.control(&Message::Streams).await.unwrap();
        let options = StreamOptions::default();
        source.sender.stripe(lanes, options).await.unwrap();
        source.sender.pages(&run, &data).await.unwrap();
        source.sender.flush().await.unwrap();
        source.sender.close().await.unwrap();
    };
    let receiving = async {
        let lanes = directory
            .further
            .expect(0)
            .unwrap()
            .all(limit)
            .await
            .unwrap();
        let first = directory.receiver.control(limit).await.unwrap();
        assert_eq!(first, Message::Streams);
        directory.receiver.stripe(lanes).unwrap();
        let mut got = Vec::new();
        loop {
            match directory.receiver.next(limit).await {
                Ok(Frame::Pages { data, .. }) => got.extend_from_slice(&data),
                Ok(other) => panic!("{other:?}"),
                Err(error) => {
                    assert!(error.is_disconnect(), "{error}");
                    return got;
                }
            }
        }
    };
    let ((), got) = tokio::join!(sending, receiving);
    assert!(got == expected, "{} bytes", got.len());
}
