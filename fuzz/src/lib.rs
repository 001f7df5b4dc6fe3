//! What is done with each input, by the fuzzer and by the test that replays
//! the corpora. A target panics when what it has read is not what it would
//! write, or is out of bounds.

use std::cell::RefCell;
use std::io;
use std::path::{Component, Path};
use std::time::Duration;

use bytes::Bytes;
use migrate_core::facts::CriuVersion;
use migrate_core::journal::Record;
use migrate_core::parked::{Away, Manifest, Mark, is_plain};
use migrate_core::stream::BatchHead;
use migrate_core::wire::{
    CONTROL_BYTES_MAX, FRAME_BODY_BYTES_MAX, FrameKind, ImagePiece, Message, PACKET_BYTES_MAX,
    PAGE_BYTES, PAGE_RUN_BYTES, PageOwner, PageRun, decode_header, encode_header,
};
use migrate_criu::{
    ImageDir, PARENT, PIECE_PAGES_MAX, PageSink, PageSocket, PageStats, serve_pages, stored_runs,
};
use migrate_ebpf_common::{Direction, Layer2, Parsed, parse};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

/// A frame's header and, by its kind, the body behind it; and the head of a
/// batch of pages.
pub fn frames(data: &[u8]) {
    let Some((&header, body)) = data.split_first_chunk::<8>() else {
        return;
    };
    if let Ok(head) = BatchHead::decode(header) {
        assert_eq!(head.encode(), Ok(header));
    }
    let Ok((kind, bytes)) = decode_header(header) else {
        return;
    };
    assert_eq!(encode_header(kind, bytes), Ok(header));
    let most = match kind {
        FrameKind::Control => CONTROL_BYTES_MAX,
        FrameKind::Pages | FrameKind::Image => FRAME_BODY_BYTES_MAX,
        FrameKind::Packet => PACKET_BYTES_MAX,
    };
    assert!(bytes <= most);
    match kind {
        FrameKind::Control | FrameKind::Packet => {}
        FrameKind::Pages => {
            if let Ok((run, pages)) = PageRun::decode(body) {
                assert_eq!(run.encode(), body[..PAGE_RUN_BYTES]);
                assert_eq!(run.data_bytes(), pages.len() as u64);
                let bytes = run.pages.checked_mul(PAGE_BYTES as u64);
                assert!(
                    bytes
                        .and_then(|bytes| run.vaddr.checked_add(bytes))
                        .is_some()
                );
            }
        }
        FrameKind::Image => {
            if let Ok(piece) = ImagePiece::decode(body) {
                assert!(!piece.name.contains('/') && !piece.name.starts_with('.'));
                let head = piece.encode_head().expect("a name that was accepted");
                assert_eq!([&head, piece.data].concat(), body);
            }
        }
    }
}

/// A control message.
pub fn messages(data: &[u8]) {
    if let Ok(message) = postcard::from_bytes::<Message>(data) {
        let bytes = postcard::to_stdvec(&message).expect("a message that was read");
        // Numbers may have been written longer than need be.
        assert!(bytes.len() <= data.len());
        assert_eq!(postcard::from_bytes(&bytes), Ok(message));
    }
}

/// One side's record of a migration.
pub fn journals(data: &[u8]) {
    if let Ok(record) = serde_json::from_slice::<Record>(data) {
        let text = serde_json::to_vec(&record).expect("a record that was read");
        let again: Record = serde_json::from_slice(&text).expect("what was written");
        assert_eq!(record, again);
    }
}

/// A packet, as an interface shows it: two bytes of link layer protocol first.
pub fn packets(data: &[u8]) {
    let Some((&protocol, packet)) = data.split_first_chunk::<2>() else {
        return;
    };
    let ethertype = u16::from_be_bytes(protocol);
    for layer2 in [Layer2::Ethernet, Layer2::None] {
        let [came, leaves] = [Direction::Ingress, Direction::Egress]
            .map(|direction| parse(packet, layer2, ethertype, direction));
        // Which end is ours changes nothing about what a packet is.
        assert_eq!(
            std::mem::discriminant::<Parsed>(&came),
            std::mem::discriminant(&leaves)
        );
    }
}

/// What a directory says about the tree that is parked in it.
pub fn manifests(data: &[u8]) {
    if let Ok(manifest) = serde_json::from_slice::<Manifest>(data) {
        let text = serde_json::to_vec(&manifest).expect("a manifest that was read");
        let again: Manifest = serde_json::from_slice(&text).expect("what was written");
        assert_eq!(manifest, again);
        for image in &manifest.images {
            let mut components = Path::new(&image.name).components();
            let first = components.next();
            let is_one = matches!(first, Some(Component::Normal(_))) && components.next().is_none();
            assert!(is_one || !is_plain(&image.name), "{:?}", image.name);
        }
        for patience in &manifest.patience {
            let silence_s = patience.silence_s();
            assert_eq!(silence_s.is_none(), patience.keepalive.is_none());
        }
    }
    if let Ok(away) = serde_json::from_slice::<Away>(data) {
        let text = serde_json::to_vec(&away).expect("a stub's word that was read");
        let again: Away = serde_json::from_slice(&text).expect("what was written");
        assert_eq!(away, again);
    }
    if let Ok(mark) = serde_json::from_slice::<Mark>(data) {
        let text = serde_json::to_vec(&mark).expect("a mark that was read");
        let again: Mark = serde_json::from_slice(&text).expect("what was written");
        assert_eq!(mark, again);
    }
}

/// An answer of CRIU.
pub fn answers(data: &[u8]) {
    if let Some(again) = migrate_criu::reencoded_answer(data) {
        let twice = migrate_criu::reencoded_answer(&again);
        assert_eq!(twice.as_ref(), Some(&again));
    }
}

/// The task of which CRIU's page stream may say that its pages are known.
const KNOWN_PID: u32 = 7;

/// Where a page stream goes: nowhere, but not unseen.
#[derive(Default)]
struct Watch {
    pages: u64,
    pages_without_data: u64,
    closed: bool,
}

impl PageSink for Watch {
    type Error = io::Error;

    async fn pages(&mut self, run: PageRun, data: Bytes) -> io::Result<()> {
        assert!(!self.closed && run.pages > 0);
        assert_eq!(run.data_bytes(), data.len() as u64);
        assert_eq!(run.vaddr % PAGE_BYTES as u64, 0);
        let bytes = run.pages.checked_mul(PAGE_BYTES as u64);
        assert!(bytes.is_some_and(|bytes| run.vaddr.checked_add(bytes).is_some()));
        if data.is_empty() {
            self.pages_without_data += run.pages;
        } else {
            assert!(run.pages <= PIECE_PAGES_MAX);
            self.pages += run.pages;
        }
        let known = run.owner == PageOwner::Task(KNOWN_PID);
        assert!(run.flags & PARENT == 0 || known);
        Ok(())
    }

    async fn close(&mut self, stats: PageStats) -> io::Result<()> {
        self.closed = true;
        assert_eq!(stats.pages, self.pages);
        assert_eq!(stats.pages_without_data, self.pages_without_data);
        Ok(())
    }
}

/// CRIU's page stream; the first byte says how old that CRIU is.
pub fn page_streams(data: &[u8]) {
    /// The other end is closed at once: nothing is waited for.
    const IDLE: Duration = Duration::from_secs(10);
    thread_local! {
        static RUNTIME: RefCell<Option<Runtime>> = const { RefCell::new(None) };
    }
    let Some((&age, stream)) = data.split_first() else {
        return;
    };
    let version = CriuVersion {
        major: 4,
        minor: u32::from(age % 4),
        sublevel: 0,
    };
    RUNTIME.with_borrow_mut(|runtime| {
        let runtime = runtime.get_or_insert_with(|| {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            builder.enable_all().build().expect("a runtime")
        });
        runtime.block_on(async {
            let (ours, theirs) = UnixStream::pair().expect("two sockets");
            let (mut answers, mut sender) = theirs.into_split();
            let mut watch = Watch::default();
            let speak = async move {
                // Nobody reads what follows an error.
                let _ = sender.write_all(stream).await;
                let _ = sender.shutdown().await;
            };
            let listen = async {
                let mut said = Vec::new();
                // Its end with more unread on the other side is an error too.
                let _ = answers.read_to_end(&mut said).await;
                said
            };
            let socket = PageSocket::new(ours, [KNOWN_PID].into());
            let serve = serve_pages(socket, version, &mut watch, IDLE);
            let (served, (), said) = tokio::join!(serve, speak, listen);
            assert_eq!(served.is_ok(), watch.closed);
            // A byte or a number for each command.
            assert!(said.len() <= data.len());
        });
    });
}

/// Cuts pieces off an input.
struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    fn number(&mut self) -> Option<u64> {
        let (&number, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(number))
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = usize::from(self.byte()?);
        let (bytes, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(bytes)
    }

    fn run(&mut self) -> Option<PageRun> {
        let owner = match self.byte()? {
            id @ ..0x80 => PageOwner::Task(u32::from(id)),
            id => PageOwner::Shared(u64::from(id)),
        };
        Some(PageRun {
            owner,
            flags: u32::from(self.byte()?),
            pages: u64::from(self.byte()?),
            vaddr: self.number()?,
        })
    }
}

/// What a source makes of a directory of images: each step is a byte that says
/// what it is, and its parameters.
pub fn images(data: &[u8]) {
    /// Names that mean something, and those that must not.
    const NAMES: [&str; 8] = [
        "inventory.img",
        "mm-7.img",
        "core-7.img",
        "core-8.img",
        "pagemap-7.img",
        "../up",
        "/abs",
        "",
    ];
    /// A page that nobody has in store.
    const MISSING: u64 = 0xff000;
    let parent = tempfile::tempdir_in("/dev/shm").expect("a directory on a tmpfs");
    let mut images = ImageDir::create(parent.path().join("images")).expect("a directory");
    let mut filler = |_: PageOwner, vaddr: u64, pages: u64, out: &mut dyn io::Write| {
        // Their addresses were checked when the gap was noted.
        let end = vaddr + pages * PAGE_BYTES as u64;
        if (vaddr..end).contains(&MISSING) {
            return Err(io::Error::other("not in store"));
        }
        (0..pages).try_for_each(|_| out.write_all(&[0x5a; PAGE_BYTES]))
    };
    let mut script = Script(data);
    let mut step = || -> Option<()> {
        // Each may be refused; what was refused must harm nothing.
        match script.byte()? {
            0 => drop(images.lazy()),
            1 => {
                let run = script.run()?;
                let bytes = usize::from(u8::try_from(run.pages).unwrap_or(0)) * PAGE_BYTES;
                let bytes = if run.data_bytes() == 0 { 0 } else { bytes };
                drop(images.pages(run, &vec![0xa5; bytes]));
            }
            2 => drop(images.gap(script.run()?)),
            3 => drop(images.later(script.run()?)),
            4 => {
                let name = usize::from(script.byte()?);
                let last = script.byte()? % 2 == 1;
                let data = script.bytes()?;
                let name = match NAMES.get(name) {
                    Some(name) => name,
                    None => std::str::from_utf8(script.bytes()?).ok()?,
                };
                drop(images.image_piece(&ImagePiece { name, last, data }));
            }
            5 => drop(images.fill(&mut filler)),
            6 => drop(images.fill_segment(u64::from(script.byte()?), &mut filler)),
            _ => return None,
        }
        Some(())
    };
    while step().is_some() {}
    let finished = images.finish();
    let page = PAGE_BYTES as u64;
    for (_, range) in images.lazy_ranges() {
        assert!(range.start < range.end && range.start % page == 0 && range.end % page == 0);
    }
    // Nothing but what the images say, or an error.
    let _ = images.credentials();
    if finished.is_ok() {
        let runs = stored_runs(images.path()).expect("maps of our own");
        for (one, next) in runs.iter().zip(runs.iter().skip(1)) {
            let end = one.run.vaddr + one.run.pages * page;
            assert!(one.run.owner != next.run.owner || end <= next.run.vaddr);
        }
    }
    let outside = std::fs::read_dir(parent.path()).expect("what was made");
    assert_eq!(outside.count(), 1);
    images.wipe().expect("the directory");
}

/// Images as they may be found: page maps, mappings, tasks.
pub fn image_files(data: &[u8]) {
    migrate_criu::read_any_image(data);
}
