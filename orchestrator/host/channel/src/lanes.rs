//! Several connections as one stream of bytes, see [`migrate_core::stream`].
//!
//! Each connection is a *lane* with a task of its own that compresses,
//! encrypts and writes, or reads, decrypts and unpacks, so that several cores
//! work on one stream. Batches go round the lanes in turn.
//!
//! ```text
//! FrameWriter -> Outbound --batch 0--> lane 0 ==TLS==> lane 0 --> Inbound -> FrameReader
//!                         --batch 1--> lane 1 ==TLS==> lane 1 -->
//!                         --batch 2--> lane 0    ...
//! ```

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::BytesMut;
use migrate_core::{
    stream::{
        BATCH_BYTES_MAX, BATCH_HEAD_BYTES, BatchHead, Bucket, Compress, Gauge, Packing, STREAMS_MAX,
    },
    wire::FrameError,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, timeout},
};
use zeroize::Zeroizing;

use crate::error::ChannelError;

/// Batches that wait for a lane beside the one under way: enough that a lane
/// never waits for the next, few enough that memory and delay stay small.
const QUEUE_BATCHES: usize = 2;

/// Bytes that are compressed to learn what that gains.
const SAMPLE_BYTES: usize = 64 << 10;

/// Buffers that are kept for use again: all that can be under way at once.
const SPARES_MAX: usize = (QUEUE_BATCHES + 2) * STREAMS_MAX as usize;

/// A batch; wiped when it is dropped, for memory of the tree may be in it.
type Batch = Zeroizing<Vec<u8>>;

/// How the page stream is sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// When batches are compressed.
    pub compress: Compress,
    /// Most bytes a second, over all connections together.
    pub limit_bytes_per_s: Option<u64>,
}

/// What the page stream has done since it began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StreamStats {
    /// Bytes handed in.
    pub raw_bytes: u64,
    /// Time that lanes spent compressing and writing, on average. Waiting for
    /// something to send, or for `--bandwidth`, does not count.
    pub busy: Duration,
}

/// Why a lane has ended.
#[derive(Debug)]
enum Failure {
    Lost(io::Error),
    Stalled(Duration),
    Head(FrameError),
}

/// What the lanes of one stream have in common.
#[derive(Debug)]
struct Shared {
    gauge: Mutex<Gauge>,
    bucket: Mutex<Option<Bucket>>,
    /// The first failure; the others follow from it.
    failure: Mutex<Option<Failure>>,
    raw_bytes: AtomicU64,
    stored_bytes: AtomicU64,
    busy_ns: AtomicU64,
    begun: Instant,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every critical section is a few assignments that leave it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn now_us(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn fail(&self, failure: Failure) {
        locked(&self.failure).get_or_insert(failure);
    }
}

enum Order {
    Batch(Batch),
    /// Everything before this has been handed to the kernel.
    Flush(oneshot::Sender<()>),
    End,
}

/// The sending end.
pub(crate) struct Outbound<W> {
    peer: String,
    queues: Vec<mpsc::Sender<Order>>,
    tasks: Vec<JoinHandle<Option<W>>>,
    spares: mpsc::Receiver<Batch>,
    next: usize,
    /// Room for the head, and what the next batch has so far.
    batch: Batch,
    shared: Arc<Shared>,
    closing: watch::Sender<bool>,
}

impl<W> Drop for Outbound<W> {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl<W: AsyncWrite + Unpin + Send + 'static> Outbound<W> {
    /// Starts a lane on each of `streams`.
    pub(crate) fn new(
        streams: Vec<W>,
        peer: &str,
        stall_limit: Duration,
        options: StreamOptions,
    ) -> Self {
        let shared = Arc::new(Shared {
            gauge: Mutex::new(Gauge::new(options.compress)),
            bucket: Mutex::new(None),
            failure: Mutex::new(None),
            raw_bytes: AtomicU64::new(0),
            stored_bytes: AtomicU64::new(0),
            busy_ns: AtomicU64::new(0),
            begun: Instant::now(),
        });
        let (spare, spares) = mpsc::channel(SPARES_MAX);
        let closing = watch::Sender::new(false);
        let (queues, tasks) = streams
            .into_iter()
            .map(|stream| {
                let (queue, orders) = mpsc::channel(QUEUE_BATCHES);
                let lane = OutLane {
                    stream,
                    stall_limit,
                    spare: spare.clone(),
                    shared: Arc::clone(&shared),
                    packed: Zeroizing::new(Vec::new()),
                };
                (queue, tokio::spawn(lane.run(orders, closing.subscribe())))
            })
            .unzip();
        let mut outbound = Self {
            peer: peer.to_owned(),
            queues,
            tasks,
            spares,
            next: 0,
            batch: empty_batch(),
            shared,
            closing,
        };
        outbound.set_limit(options.limit_bytes_per_s);
        outbound
    }

    pub(crate) fn set_limit(&mut self, bytes_per_s: Option<u64>) {
        let now_us = self.shared.now_us();
        *locked(&self.shared.bucket) = bytes_per_s.map(|rate| Bucket::new(rate, now_us));
        let lanes = u32::try_from(self.queues.len()).unwrap_or(STREAMS_MAX);
        locked(&self.shared.gauge).limit(bytes_per_s, lanes);
    }

    pub(crate) fn stats(&self) -> StreamStats {
        let lanes = self.queues.len().max(1) as u64;
        StreamStats {
            raw_bytes: self.shared.raw_bytes.load(Ordering::Relaxed),
            busy: Duration::from_nanos(self.shared.busy_ns.load(Ordering::Relaxed) / lanes),
        }
    }

    /// Bytes written, without heads of batches.
    pub(crate) fn sent_bytes(&self) -> u64 {
        self.shared.stored_bytes.load(Ordering::Relaxed)
    }

    /// Takes bytes; full batches go out. Not cancel safe: the caller must not
    /// go on with the stream after a call that was dropped.
    pub(crate) async fn push(&mut self, mut bytes: &[u8]) -> Result<(), ChannelError> {
        while !bytes.is_empty() {
            let room = BATCH_HEAD_BYTES + BATCH_BYTES_MAX - self.batch.len();
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.batch.extend_from_slice(now);
            bytes = later;
            if now.len() == room {
                self.emit().await?;
            }
        }
        Ok(())
    }

    /// Sends what has been gathered, without waiting until it is written.
    pub(crate) async fn emit(&mut self) -> Result<(), ChannelError> {
        let raw_bytes = self.batch.len() - BATCH_HEAD_BYTES;
        if raw_bytes == 0 {
            return Ok(());
        }
        let wait_us = match &mut *locked(&self.shared.bucket) {
            Some(bucket) => bucket.take(raw_bytes, self.shared.now_us()),
            None => 0,
        };
        if wait_us > 0 {
            tokio::time::sleep(Duration::from_micros(wait_us)).await;
        }
        let spare = self.spares.try_recv().unwrap_or_else(|_| empty_batch());
        let batch = std::mem::replace(&mut self.batch, spare);
        self.shared
            .raw_bytes
            .fetch_add(raw_bytes as u64, Ordering::Relaxed);
        let lane = self.next;
        self.next = (lane + 1) % self.queues.len();
        let sent = self.queues[lane].send(Order::Batch(batch)).await;
        sent.map_err(|_| self.failure())
    }

    /// Waits until everything has been handed to the kernel.
    pub(crate) async fn flush(&mut self) -> Result<(), ChannelError> {
        self.emit().await?;
        let mut done = Vec::with_capacity(self.queues.len());
        for queue in &self.queues {
            let (tell, told) = oneshot::channel();
            if queue.send(Order::Flush(tell)).await.is_err() {
                return Err(self.failure());
            }
            done.push(told);
        }
        for told in done {
            // A lane that stalls or breaks drops its end.
            if told.await.is_err() {
                return Err(self.failure());
            }
        }
        Ok(())
    }

    /// Ends the stream on every lane; gives the first one back, and says how
    /// many bytes went over all of them.
    pub(crate) async fn end(mut self) -> Result<(W, u64), ChannelError> {
        self.emit().await?;
        for queue in &self.queues {
            if queue.send(Order::End).await.is_err() {
                return Err(self.failure());
            }
        }
        let mut first = None;
        for (index, task) in self.tasks.iter_mut().enumerate() {
            match task.await {
                Ok(Some(stream)) if index == 0 => first = Some(stream),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return Err(self.failure()),
            }
        }
        match first {
            Some(first) => Ok((first, self.sent_bytes())),
            None => Err(self.failure()),
        }
    }

    /// Gives up: what waits is thrown away, and the peer hears of the end.
    pub(crate) async fn close(&mut self) {
        self.closing.send_replace(true);
        for task in &mut self.tasks {
            // A lane that broke before has no farewell to say.
            let _ = task.await;
        }
        self.tasks.clear();
    }

    fn failure(&self) -> ChannelError {
        let peer = self.peer.clone();
        match locked(&self.shared.failure).take() {
            Some(Failure::Lost(source)) => ChannelError::from_stream(&self.peer, source),
            Some(Failure::Stalled(waited)) => ChannelError::Deadline {
                awaited: format!("{peer} to take what was sent"),
                waited,
            },
            Some(Failure::Head(source)) => ChannelError::Frame {
                direction: "to",
                peer,
                source,
            },
            None => ChannelError::HalfWritten { peer },
        }
    }
}

fn empty_batch() -> Batch {
    let mut batch = Vec::with_capacity(BATCH_HEAD_BYTES + BATCH_BYTES_MAX);
    batch.resize(BATCH_HEAD_BYTES, 0);
    Zeroizing::new(batch)
}

struct OutLane<W> {
    stream: W,
    stall_limit: Duration,
    spare: mpsc::Sender<Batch>,
    shared: Arc<Shared>,
    /// A compressed batch behind its head.
    packed: Batch,
}

impl<W: AsyncWrite + Unpin> OutLane<W> {
    /// Carries out orders to the end of the stream, and returns the connection
    /// when it came to that.
    async fn run(
        mut self,
        mut orders: mpsc::Receiver<Order>,
        mut closing: watch::Receiver<bool>,
    ) -> Option<W> {
        let ended = tokio::select! {
            biased;
            // No more orders are wanted; an error means that the sender is gone.
            _ = closing.wait_for(|closing| *closing) => Ok(false),
            ended = self.obey(&mut orders) => ended,
        };
        match ended {
            Ok(true) => return Some(self.stream),
            Ok(false) => {
                let _ = timeout(self.stall_limit, self.stream.shutdown()).await;
            }
            Err(failure) => self.shared.fail(failure),
        }
        None
    }

    /// `true` at the end of the stream, `false` when the sender is gone.
    async fn obey(&mut self, orders: &mut mpsc::Receiver<Order>) -> Result<bool, Failure> {
        while let Some(order) = orders.recv().await {
            match order {
                Order::Batch(mut batch) => {
                    self.send(&mut batch).await?;
                    if orders.is_empty() {
                        self.flush().await?;
                    }
                    batch.truncate(BATCH_HEAD_BYTES);
                    // As many as can be under way fit.
                    let _ = self.spare.try_send(batch);
                }
                Order::Flush(tell) => {
                    self.flush().await?;
                    // Nobody may be waiting any longer.
                    let _ = tell.send(());
                }
                Order::End => {
                    let head = BatchHead::END.encode().map_err(Failure::Head)?;
                    self.write(&head).await?;
                    self.flush().await?;
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    async fn send(&mut self, batch: &mut Batch) -> Result<(), Failure> {
        let begun = Instant::now();
        let raw_bytes = batch.len() - BATCH_HEAD_BYTES;
        let packing = locked(&self.shared.gauge).decide();
        let mut stored_bytes = raw_bytes;
        match packing {
            Packing::Plain => {}
            Packing::Sample => {
                let end = batch.len().min(BATCH_HEAD_BYTES + SAMPLE_BYTES);
                self.pack(&batch[BATCH_HEAD_BYTES..end]);
            }
            Packing::Lz4 => stored_bytes = self.pack(&batch[BATCH_HEAD_BYTES..]).min(raw_bytes),
        }
        let head = BatchHead {
            raw_bytes,
            stored_bytes,
        };
        let mut whole = if head.packed() {
            std::mem::take(&mut self.packed)
        } else {
            std::mem::take(batch)
        };
        whole[..BATCH_HEAD_BYTES].copy_from_slice(&head.encode().map_err(Failure::Head)?);
        if head.packed()
            && let Some(bucket) = &mut *locked(&self.shared.bucket)
        {
            bucket.give_back(raw_bytes - stored_bytes);
        }
        let writing = Instant::now();
        self.write(&whole[..BATCH_HEAD_BYTES + stored_bytes])
            .await?;
        locked(&self.shared.gauge).wrote(stored_bytes, nanos(writing.elapsed()));
        if head.packed() {
            self.packed = whole;
        } else {
            *batch = whole;
        }
        let shared = &self.shared;
        shared
            .stored_bytes
            .fetch_add(stored_bytes as u64, Ordering::Relaxed);
        shared
            .busy_ns
            .fetch_add(nanos(begun.elapsed()), Ordering::Relaxed);
        Ok(())
    }

    /// Compresses into `packed`, notes what it cost, and says what is left.
    fn pack(&mut self, raw: &[u8]) -> usize {
        let begun = Instant::now();
        let room = BATCH_HEAD_BYTES + lz4_flex::block::get_maximum_output_size(BATCH_BYTES_MAX);
        self.packed.resize(room, 0);
        let left = lz4_flex::block::compress_into(raw, &mut self.packed[BATCH_HEAD_BYTES..])
            // There is room for the worst case; it would count as incompressible.
            .unwrap_or(raw.len());
        locked(&self.shared.gauge).packed(raw.len(), left, nanos(begun.elapsed()));
        left
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        match timeout(self.stall_limit, self.stream.write_all(bytes)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Failure::Lost(error)),
            Err(_) => Err(Failure::Stalled(self.stall_limit)),
        }
    }

    async fn flush(&mut self) -> Result<(), Failure> {
        match timeout(self.stall_limit, self.stream.flush()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Failure::Lost(error)),
            Err(_) => Err(Failure::Stalled(self.stall_limit)),
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The receiving end.
pub(crate) struct Inbound<R> {
    peer: String,
    queues: Vec<mpsc::Receiver<Result<Vec<u8>, ChannelError>>>,
    tasks: Vec<JoinHandle<Option<R>>>,
    spare: mpsc::Sender<Vec<u8>>,
    next: usize,
}

impl<R> Drop for Inbound<R> {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl<R: AsyncRead + Unpin + Send + 'static> Inbound<R> {
    /// Starts a lane on each stream; of the first one, bytes have come already.
    pub(crate) fn new(first: R, come: BytesMut, further: Vec<R>, peer: &str) -> Self {
        let (spare, spares) = mpsc::channel(SPARES_MAX);
        let spares = Arc::new(Mutex::new(spares));
        let further = further.into_iter().map(|stream| (stream, BytesMut::new()));
        let (queues, tasks) = std::iter::once((first, come))
            .chain(further)
            .map(|(stream, come)| {
                let (queue, batches) = mpsc::channel(QUEUE_BATCHES);
                let lane = InLane {
                    source: Source { stream, come },
                    peer: peer.to_owned(),
                    spares: Arc::clone(&spares),
                    packed: Vec::new(),
                };
                (batches, tokio::spawn(lane.run(queue)))
            })
            .unzip();
        Self {
            peer: peer.to_owned(),
            queues,
            tasks,
            spare,
            next: 0,
        }
    }

    /// The next batch, `None` at the end of the stream. May be cancelled.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<u8>>, ChannelError> {
        match self.queues[self.next].recv().await {
            Some(Ok(batch)) => {
                self.next = (self.next + 1) % self.queues.len();
                Ok(Some(batch))
            }
            Some(Err(error)) => Err(error),
            None => Ok(None),
        }
    }

    /// Takes a batch back that has been read, and says how long it was.
    pub(crate) fn recycle(&self, batch: Vec<u8>) -> usize {
        let bytes = batch.len();
        // As many as can be under way fit.
        let _ = self.spare.try_send(batch);
        bytes
    }

    /// Waits for the end of the stream on every lane and gives the first one
    /// back.
    pub(crate) async fn end(mut self) -> Result<R, ChannelError> {
        for _ in 0..self.queues.len() {
            if self.next().await?.is_some() {
                return Err(ChannelError::Unexpected {
                    peer: self.peer.clone(),
                    got: "more pages",
                    wanted: "the end of the page stream",
                });
            }
            self.next = (self.next + 1) % self.queues.len();
        }
        let mut first = None;
        for (index, task) in self.tasks.iter_mut().enumerate() {
            match task.await {
                Ok(Some(stream)) if index == 0 => first = Some(stream),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        first.ok_or_else(|| ChannelError::Truncated {
            peer: self.peer.clone(),
        })
    }
}

struct InLane<R> {
    source: Source<R>,
    peer: String,
    spares: Arc<Mutex<mpsc::Receiver<Vec<u8>>>>,
    packed: Vec<u8>,
}

impl<R: AsyncRead + Unpin> InLane<R> {
    /// Hands on batches to the end of the stream, and returns the connection
    /// when it came to that.
    async fn run(mut self, queue: mpsc::Sender<Result<Vec<u8>, ChannelError>>) -> Option<R> {
        loop {
            match self.batch().await {
                Ok(Some(batch)) => queue.send(Ok(batch)).await.ok()?,
                Ok(None) => return Some(self.source.stream),
                Err(error) => {
                    // Whoever waits for nothing any more has ended, too.
                    let _ = queue.send(Err(error)).await;
                    return None;
                }
            }
        }
    }

    async fn batch(&mut self) -> Result<Option<Vec<u8>>, ChannelError> {
        let mut head = [0; BATCH_HEAD_BYTES];
        if !self.source.read(&mut head, &self.peer).await? {
            return Err(ChannelError::Closed {
                peer: self.peer.clone(),
            });
        }
        let head = BatchHead::decode(head).map_err(|source| ChannelError::Frame {
            direction: "from",
            peer: self.peer.clone(),
            source,
        })?;
        if head == BatchHead::END {
            return Ok(None);
        }
        let mut batch = locked(&self.spares).try_recv().unwrap_or_default();
        batch.resize(head.raw_bytes, 0);
        if !head.packed() {
            read_body(&mut self.source, &mut batch, &self.peer).await?;
            return Ok(Some(batch));
        }
        self.packed.resize(head.stored_bytes, 0);
        read_body(&mut self.source, &mut self.packed, &self.peer).await?;
        match lz4_flex::block::decompress_into(&self.packed, &mut batch) {
            Ok(bytes) if bytes == head.raw_bytes => Ok(Some(batch)),
            _ => Err(ChannelError::Frame {
                direction: "from",
                peer: self.peer.clone(),
                source: FrameError::Malformed {
                    what: "compressed batch",
                },
            }),
        }
    }
}

async fn read_body<R: AsyncRead + Unpin>(
    source: &mut Source<R>,
    into: &mut [u8],
    peer: &str,
) -> Result<(), ChannelError> {
    if source.read(into, peer).await? {
        return Ok(());
    }
    Err(ChannelError::Truncated {
        peer: peer.to_owned(),
    })
}

/// A stream of which bytes may have come already.
struct Source<R> {
    stream: R,
    come: BytesMut,
}

impl<R: AsyncRead + Unpin> Source<R> {
    /// Fills `into`; `false` when the stream has ended before its first byte.
    async fn read(&mut self, into: &mut [u8], peer: &str) -> Result<bool, ChannelError> {
        let early = self.come.len().min(into.len());
        let mut at = early;
        into[..early].copy_from_slice(&self.come.split_to(early));
        while at < into.len() {
            match self.stream.read(&mut into[at..]).await {
                Ok(0) if at == 0 => return Ok(false),
                Ok(0) => {
                    return Err(ChannelError::Truncated {
                        peer: peer.to_owned(),
                    });
                }
                Ok(bytes) => at += bytes,
                // TCP ended without the goodbye of TLS: a process that died.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && at == 0 => {
                    return Ok(false);
                }
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(ChannelError::Truncated {
                        peer: peer.to_owned(),
                    });
                }
                Err(source) => return Err(ChannelError::from_stream(peer, source)),
            }
        }
        Ok(true)
    }
}
