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

use crate::error::ChannelError;

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

/// The sending half, over any stream.
pub(crate) struct FrameWriter<W> {
    stream: W,
    peer: String,
    gathered: Vec<u8>,
    sent_bytes: u64,
    stall_limit: Duration,
    /// Set while a frame is under way, so that a call that was cancelled in
    /// between cannot be followed by bytes that the peer would misread.
    half_written: bool,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    pub(crate) fn new(stream: W, peer: String) -> Self {
        Self {
            stream,
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
        self.sent_bytes
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
        self.begin()?;
        self.write_gathered().await?;
        match timeout(self.stall_limit, self.stream.flush()).await {
            Ok(Ok(())) => self.end(),
            Ok(Err(source)) => Err(ChannelError::from_stream(&self.peer, source)),
            Err(_) => Err(self.stalled()),
        }
    }

    /// Says goodbye: the peer then knows that nothing was cut off. Where a
    /// frame was, the peer hears of the end in the middle of it.
    pub(crate) async fn close(&mut self) -> Result<(), ChannelError> {
        if !self.half_written {
            self.flush().await?;
        }
        match timeout(self.stall_limit, self.stream.shutdown()).await {
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
        self.gathered.extend_from_slice(&header);
        self.gathered.extend_from_slice(head);
        if data.len() <= GATHER_BYTES {
            self.gathered.extend_from_slice(data);
            if self.gathered.len() >= GATHER_BYTES {
                self.write_gathered().await?;
            }
        } else {
            self.write_gathered().await?;
            Self::write(
                &mut self.stream,
                data,
                self.stall_limit,
                &mut self.sent_bytes,
                &self.peer,
            )
            .await?;
        }
        self.end()
    }

    fn begin(&mut self) -> Result<(), ChannelError> {
        if self.half_written {
            return Err(ChannelError::HalfWritten {
                peer: self.peer.clone(),
            });
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

    async fn write_gathered(&mut self) -> Result<(), ChannelError> {
        Self::write(
            &mut self.stream,
            &self.gathered,
            self.stall_limit,
            &mut self.sent_bytes,
            &self.peer,
        )
        .await?;
        self.gathered.clear();
        Ok(())
    }

    async fn write(
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

/// The receiving half, over any stream. A call that is cancelled loses nothing.
pub(crate) struct FrameReader<R> {
    stream: R,
    peer: String,
    /// Bytes that have come and are not yet part of a frame. Its memory is
    /// used again as soon as the frames cut from it are dropped.
    buffer: BytesMut,
    received_bytes: u64,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(crate) fn new(stream: R, peer: String) -> Self {
        Self {
            stream,
            peer,
            buffer: BytesMut::with_capacity(GATHER_BYTES),
            received_bytes: 0,
        }
    }

    pub(crate) fn received_bytes(&self) -> u64 {
        self.received_bytes
    }

    pub(crate) async fn next(&mut self, deadline: Duration) -> Result<Frame, ChannelError> {
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
            let got = match self.stream.read_buf(&mut self.buffer).await {
                Ok(got) => got,
                // TCP ended without the goodbye of TLS: a process that died.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => 0,
                Err(source) => return Err(ChannelError::from_stream(&self.peer, source)),
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
