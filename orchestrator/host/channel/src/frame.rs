//! Frames on a byte stream: the only code that reads or writes a connection.

use std::{io, time::Duration};

use bytes::{Bytes, BytesMut};
use migrate_core::wire::{
    CONTROL_BYTES_MAX, FRAME_BODY_BYTES_MAX, FRAME_HEADER_BYTES, FrameError, FrameKind, ImagePiece,
    Message, PACKET_BYTES_MAX, PAGE_BYTES, PAGE_RUN_BYTES, PageRun, decode_header, encode_header,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::timeout,
};
use zeroize::Zeroize as _;

use crate::{
    error::ChannelError,
    lanes::{Inbound, Outbound, StreamOptions, StreamStats},
};

/// How long a peer may take nothing before it counts as dead: long enough for
/// a handful of TCP retransmissions, short enough to roll back before the
/// clients of a frozen tree give up.
pub const STALL_LIMIT: Duration = Duration::from_secs(30);

/// Small frames are gathered until they fill sixteen TLS records.
const GATHER_BYTES: usize = 256 << 10;

/// The piece of a frame that has to be taken within one stall limit. It bounds
/// a call and still lets a line of a few kilobytes a second finish.
const PROGRESS_BYTES: usize = 256 << 10;

/// Pages in a full frame.
const PAGES_PER_FRAME: usize = (FRAME_BODY_BYTES_MAX - PAGE_RUN_BYTES) / PAGE_BYTES;

/// What a frame holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A message.
    Control(Message),
    /// Pages; `data` has [`PageRun::data_bytes`] bytes.
    Pages {
        /// Where they belong.
        run: PageRun,
        /// Their contents.
        data: Bytes,
    },
    /// A piece of an image file.
    Image {
        /// The file's name, checked: it cannot leave a directory.
        name: String,
        /// This is the file's last piece.
        last: bool,
        /// Its bytes.
        data: Bytes,
    },
    /// A packet that the source held back.
    Packet(Bytes),
}

impl Frame {
    pub(crate) fn what(&self) -> &'static str {
        match self {
            Self::Control(_) => "a message",
            Self::Pages { .. } => "pages",
            Self::Image { .. } => "an image",
            Self::Packet(_) => "a packet",
        }
    }
}

/// Where frames go.
enum Out<W> {
    One(W),
    Lanes(Outbound<W>),
    /// In between, and after a change that failed.
    Nowhere,
}

/// The sending half, over any stream.
pub(crate) struct FrameWriter<W> {
    out: Out<W>,
    peer: String,
    gathered: Vec<u8>,
    sent_bytes: u64,
    stall_limit: Duration,
    /// Set while a frame is under way, so that a call that was cancelled in
    /// between cannot be followed by bytes that the peer would misread.
    half_written: bool,
}

impl<W: AsyncWrite + Unpin + Send + 'static> FrameWriter<W> {
    pub(crate) fn new(stream: W, peer: String) -> Self {
        Self {
            out: Out::One(stream),
            peer,
            gathered: Vec::with_capacity(2 * GATHER_BYTES),
            sent_bytes: 0,
            stall_limit: STALL_LIMIT,
            half_written: false,
        }
    }

    pub(crate) fn set_stall_limit(&mut self, limit: Duration) {
        self.stall_limit = limit;
    }

    pub(crate) fn sent_bytes(&self) -> u64 {
        match &self.out {
            Out::Lanes(lanes) => self.sent_bytes + lanes.sent_bytes(),
            Out::One(_) | Out::Nowhere => self.sent_bytes,
        }
    }

    /// The stream alone; nothing may be gathered.
    pub(crate) fn into_stream(mut self) -> Option<W> {
        match std::mem::replace(&mut self.out, Out::Nowhere) {
            Out::One(stream) if self.gathered.is_empty() => Some(stream),
            _ => None,
        }
    }

    /// From here on frames go over this connection and `further` in turn.
    pub(crate) async fn stripe(
        &mut self,
        further: Vec<W>,
        options: StreamOptions,
    ) -> Result<(), ChannelError> {
        self.flush().await?;
        self.begin()?;
        let Out::One(first) = std::mem::replace(&mut self.out, Out::Nowhere) else {
            return Err(self.half_written());
        };
        let streams = std::iter::once(first).chain(further).collect();
        self.out = Out::Lanes(Outbound::new(
            streams,
            &self.peer,
            self.stall_limit,
            options,
        ));
        self.end()
    }

    /// The last frame over several connections has been sent.
    pub(crate) async fn unstripe(&mut self) -> Result<(), ChannelError> {
        self.begin()?;
        match std::mem::replace(&mut self.out, Out::Nowhere) {
            Out::Lanes(lanes) => {
                let (first, sent_bytes) = lanes.end().await?;
                self.out = Out::One(first);
                self.sent_bytes += sent_bytes;
                self.end()
            }
            _ => Err(self.half_written()),
        }
    }

    /// Holds the page stream to a rate, or no longer.
    pub(crate) fn set_limit(&mut self, bytes_per_s: Option<u64>) {
        if let Out::Lanes(lanes) = &mut self.out {
            lanes.set_limit(bytes_per_s);
        }
    }

    pub(crate) fn stream_stats(&self) -> StreamStats {
        match &self.out {
            Out::Lanes(lanes) => lanes.stats(),
            Out::One(_) | Out::Nowhere => StreamStats::default(),
        }
    }

    pub(crate) async fn control(&mut self, message: &Message) -> Result<(), ChannelError> {
        let body = postcard::to_stdvec(message).map_err(|source| ChannelError::Message {
            direction: "to",
            peer: self.peer.clone(),
            source,
        })?;
        if body.len() > CONTROL_BYTES_MAX {
            return Err(self.bad_frame(FrameError::TooLarge {
                announced: body.len(),
                limit: CONTROL_BYTES_MAX,
            }));
        }
        self.frame(FrameKind::Control, &[], &body).await?;
        if matches!(self.out, Out::Lanes(_)) {
            // On its way at once; nobody has to wait until it is.
            return self.send_gathered().await;
        }
        self.flush().await
    }

    pub(crate) async fn pages(&mut self, run: &PageRun, data: &[u8]) -> Result<(), ChannelError> {
        if run.data_bytes() != data.len() as u64 {
            return Err(self.bad_frame(FrameError::Malformed { what: "page run" }));
        }
        if data.is_empty() {
            return self.frame(FrameKind::Pages, &run.encode(), data).await;
        }
        let mut part = *run;
        for piece in data.chunks(PAGES_PER_FRAME * PAGE_BYTES) {
            part.pages = (piece.len() / PAGE_BYTES) as u64;
            self.frame(FrameKind::Pages, &part.encode(), piece).await?;
            part.vaddr = part.vaddr.wrapping_add(piece.len() as u64);
        }
        Ok(())
    }

    pub(crate) async fn image(&mut self, image: ImagePiece<'_>) -> Result<(), ChannelError> {
        let mut data = image.data;
        loop {
            let mut piece = ImagePiece { data, ..image };
            let head_bytes = 2 + image.name.len();
            let (now, rest) = data.split_at(
                data.len()
                    .min(FRAME_BODY_BYTES_MAX.saturating_sub(head_bytes)),
            );
            piece.last = image.last && rest.is_empty();
            let head = piece
                .encode_head()
                .map_err(|source| self.bad_frame(source))?;
            self.frame(FrameKind::Image, &head, now).await?;
            if rest.is_empty() {
                return Ok(());
            }
            data = rest;
        }
    }

    pub(crate) async fn packet(&mut self, packet: &[u8]) -> Result<(), ChannelError> {
        if packet.len() > PACKET_BYTES_MAX {
            return Err(self.bad_frame(FrameError::TooLarge {
                announced: packet.len(),
                limit: PACKET_BYTES_MAX,
            }));
        }
        self.frame(FrameKind::Packet, &[], packet).await
    }

    pub(crate) async fn flush(&mut self) -> Result<(), ChannelError> {
        self.send_gathered().await?;
        self.begin()?;
        match &mut self.out {
            Out::One(stream) => match timeout(self.stall_limit, stream.flush()).await {
                Ok(Ok(())) => {}
                Ok(Err(source)) => return Err(ChannelError::from_stream(&self.peer, source)),
                Err(_) => return Err(self.stalled()),
            },
            Out::Lanes(lanes) => lanes.flush().await?,
            Out::Nowhere => return Err(self.half_written()),
        }
        self.end()
    }

    /// Says goodbye: the peer then knows that nothing was cut off. Where a
    /// frame was, or pages are still under way over several connections, the
    /// peer hears of the end in the middle of it.
    pub(crate) async fn close(&mut self) -> Result<(), ChannelError> {
        if !self.half_written && matches!(self.out, Out::One(_)) {
            self.flush().await?;
        }
        let stream = match &mut self.out {
            Out::One(stream) => stream,
            Out::Lanes(lanes) => {
                lanes.close().await;
                return Ok(());
            }
            Out::Nowhere => return Err(self.half_written()),
        };
        match timeout(self.stall_limit, stream.shutdown()).await {
            Ok(Ok(())) => Ok(()),
            // The peer was faster.
            Ok(Err(error)) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
            Ok(Err(source)) => Err(ChannelError::from_stream(&self.peer, source)),
            Err(_) => Err(self.stalled()),
        }
    }

    async fn frame(
        &mut self,
        kind: FrameKind,
        head: &[u8],
        data: &[u8],
    ) -> Result<(), ChannelError> {
        let header = encode_header(kind, head.len() + data.len())
            .map_err(|source| self.bad_frame(source))?;
        self.begin()?;
        let stream = match &mut self.out {
            Out::One(stream) => stream,
            Out::Lanes(lanes) => {
                for part in [&header, head, data] {
                    lanes.push(part).await?;
                }
                return self.end();
            }
            Out::Nowhere => return Err(self.half_written()),
        };
        self.gathered.extend_from_slice(&header);
        self.gathered.extend_from_slice(head);
        let (together, apart) = if data.len() <= GATHER_BYTES {
            (data, &[][..])
        } else {
            (&[][..], data)
        };
        self.gathered.extend_from_slice(together);
        if !apart.is_empty() || self.gathered.len() >= GATHER_BYTES {
            for bytes in [&self.gathered[..], apart] {
                let limit = self.stall_limit;
                write(stream, bytes, limit, &mut self.sent_bytes, &self.peer).await?;
            }
            self.gathered.clear();
        }
        self.end()
    }

    fn begin(&mut self) -> Result<(), ChannelError> {
        if self.half_written {
            return Err(self.half_written());
        }
        self.half_written = true;
        Ok(())
    }

    #[expect(
        clippy::unnecessary_wraps,
        reason = "the last expression of calls that can fail"
    )]
    fn end(&mut self) -> Result<(), ChannelError> {
        self.half_written = false;
        Ok(())
    }

    async fn send_gathered(&mut self) -> Result<(), ChannelError> {
        self.begin()?;
        match &mut self.out {
            Out::One(stream) => {
                let limit = self.stall_limit;
                let gathered = &self.gathered;
                write(stream, gathered, limit, &mut self.sent_bytes, &self.peer).await?;
                self.gathered.clear();
            }
            Out::Lanes(lanes) => lanes.emit().await?,
            Out::Nowhere => return Err(self.half_written()),
        }
        self.end()
    }

    fn half_written(&self) -> ChannelError {
        ChannelError::HalfWritten {
            peer: self.peer.clone(),
        }
    }

    fn stalled(&self) -> ChannelError {
        stalled(&self.peer, self.stall_limit)
    }

    fn bad_frame(&self, source: FrameError) -> ChannelError {
        ChannelError::Frame {
            direction: "to",
            peer: self.peer.clone(),
            source,
        }
    }
}

async fn write<W: AsyncWrite + Unpin>(
    stream: &mut W,
    bytes: &[u8],
    stall_limit: Duration,
    sent_bytes: &mut u64,
    peer: &str,
) -> Result<(), ChannelError> {
    for piece in bytes.chunks(PROGRESS_BYTES) {
        match timeout(stall_limit, stream.write_all(piece)).await {
            Ok(Ok(())) => *sent_bytes += piece.len() as u64,
            Ok(Err(source)) => return Err(ChannelError::from_stream(peer, source)),
            Err(_) => return Err(stalled(peer, stall_limit)),
        }
    }
    Ok(())
}

fn stalled(peer: &str, waited: Duration) -> ChannelError {
    ChannelError::Deadline {
        awaited: format!("{peer} to take what was sent"),
        waited,
    }
}

impl<W> Drop for FrameWriter<W> {
    fn drop(&mut self) {
        // Memory of the tree may be in here.
        self.gathered.zeroize();
    }
}

/// Where frames come from.
enum In<R> {
    One(R),
    Lanes(Inbound<R>),
    /// In between, and after a change that failed.
    Nowhere,
}

/// The receiving half, over any stream. A call that is cancelled loses nothing.
pub(crate) struct FrameReader<R> {
    stream: In<R>,
    peer: String,
    /// Bytes that have come and are not yet part of a frame. Its memory is
    /// used again as soon as the frames cut from it are dropped.
    buffer: BytesMut,
    received_bytes: u64,
}

impl<R: AsyncRead + Unpin + Send + 'static> FrameReader<R> {
    pub(crate) fn new(stream: R, peer: String) -> Self {
        Self {
            stream: In::One(stream),
            peer,
            buffer: BytesMut::with_capacity(GATHER_BYTES),
            received_bytes: 0,
        }
    }

    pub(crate) fn received_bytes(&self) -> u64 {
        self.received_bytes
    }

    /// The stream alone; nothing may have come beyond the last frame.
    pub(crate) fn into_stream(self) -> Option<R> {
        match self.stream {
            In::One(stream) if self.buffer.is_empty() => Some(stream),
            _ => None,
        }
    }

    /// From here on frames come over this connection and `further` in turn.
    pub(crate) fn stripe(&mut self, further: Vec<R>) -> Result<(), ChannelError> {
        match std::mem::replace(&mut self.stream, In::Nowhere) {
            In::One(first) => {
                // What has come already is the beginning of a batch.
                let come = self.buffer.split();
                self.stream = In::Lanes(Inbound::new(first, come, further, &self.peer));
                Ok(())
            }
            _ => Err(self.more_than("the page stream")),
        }
    }

    /// The last frame over several connections has come.
    pub(crate) async fn unstripe(&mut self, deadline: Duration) -> Result<(), ChannelError> {
        match std::mem::replace(&mut self.stream, In::Nowhere) {
            In::Lanes(lanes) if self.buffer.is_empty() => {
                let first =
                    timeout(deadline, lanes.end())
                        .await
                        .map_err(|_| ChannelError::Deadline {
                            awaited: format!("{} to end the page stream", self.peer),
                            waited: deadline,
                        })?;
                self.stream = In::One(first?);
                Ok(())
            }
            _ => Err(self.more_than("the end of the page stream")),
        }
    }

    fn more_than(&self, wanted: &'static str) -> ChannelError {
        ChannelError::Unexpected {
            peer: self.peer.clone(),
            got: "more than that",
            wanted,
        }
    }

    pub(crate) async fn next(&mut self, deadline: Duration) -> Result<Frame, ChannelError> {
        // Of tens of thousands that come at once, few need a timer.
        if self.has_whole() {
            return self.read_frame().await;
        }
        match timeout(deadline, self.read_frame()).await {
            Ok(result) => result,
            Err(_) => Err(ChannelError::Deadline {
                awaited: format!("{} to send", self.peer),
                waited: deadline,
            }),
        }
    }

    pub(crate) async fn control(&mut self, deadline: Duration) -> Result<Message, ChannelError> {
        match self.next(deadline).await? {
            Frame::Control(message) => Ok(message),
            other => Err(ChannelError::Unexpected {
                peer: self.peer.clone(),
                got: other.what(),
                wanted: "a message",
            }),
        }
    }

    /// Whether all of the next frame is here.
    fn has_whole(&self) -> bool {
        self.buffer.first_chunk().is_some_and(|&header| {
            decode_header(header)
                .is_ok_and(|(_, body_bytes)| self.buffer.len() >= FRAME_HEADER_BYTES + body_bytes)
        })
    }

    async fn read_frame(&mut self) -> Result<Frame, ChannelError> {
        self.fill(FRAME_HEADER_BYTES).await?;
        let mut header = [0; FRAME_HEADER_BYTES];
        header.copy_from_slice(&self.buffer[..FRAME_HEADER_BYTES]);
        let (kind, body_bytes) = decode_header(header).map_err(|source| self.bad_frame(source))?;
        self.fill(FRAME_HEADER_BYTES + body_bytes).await?;
        let mut body = self.buffer.split_to(FRAME_HEADER_BYTES + body_bytes);
        let body = body.split_off(FRAME_HEADER_BYTES).freeze();
        match kind {
            FrameKind::Control => match postcard::take_from_bytes(&body) {
                Ok((message, [])) => Ok(Frame::Control(message)),
                Ok(_) => Err(self.bad_frame(FrameError::Malformed {
                    what: "message with bytes after its end",
                })),
                Err(source) => Err(ChannelError::Message {
                    direction: "from",
                    peer: self.peer.clone(),
                    source,
                }),
            },
            FrameKind::Pages => {
                let (run, data) = PageRun::decode(&body).map_err(|e| self.bad_frame(e))?;
                let data = body.slice_ref(data);
                Ok(Frame::Pages { run, data })
            }
            FrameKind::Image => {
                let piece = ImagePiece::decode(&body).map_err(|e| self.bad_frame(e))?;
                Ok(Frame::Image {
                    name: piece.name.to_owned(),
                    last: piece.last,
                    data: body.slice_ref(piece.data),
                })
            }
            FrameKind::Packet => Ok(Frame::Packet(body)),
        }
    }

    /// Reads until the buffer holds `wanted` bytes or more.
    async fn fill(&mut self, wanted: usize) -> Result<(), ChannelError> {
        while self.buffer.len() < wanted {
            let missing = wanted - self.buffer.len();
            self.buffer.reserve(missing.max(GATHER_BYTES / 4));
            let got = match &mut self.stream {
                In::One(stream) => match stream.read_buf(&mut self.buffer).await {
                    Ok(got) => got,
                    // TCP ended without the goodbye of TLS: a process that died.
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
                    Err(source) => return Err(ChannelError::from_stream(&self.peer, source)),
                },
                In::Lanes(lanes) => match lanes.next().await {
                    Ok(Some(batch)) => {
                        self.buffer.extend_from_slice(&batch);
                        lanes.recycle(batch)
                    }
                    Ok(None) | Err(ChannelError::Closed { .. }) => 0,
                    Err(error) => return Err(error),
                },
                In::Nowhere => 0,
            };
            if got == 0 {
                let peer = self.peer.clone();
                return Err(if self.buffer.is_empty() {
                    ChannelError::Closed { peer }
                } else {
                    ChannelError::Truncated { peer }
                });
            }
            self.received_bytes += got as u64;
        }
        Ok(())
    }

    fn bad_frame(&self, source: FrameError) -> ChannelError {
        ChannelError::Frame {
            direction: "from",
            peer: self.peer.clone(),
            source,
        }
    }
}
