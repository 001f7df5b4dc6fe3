//! The page stream: how bytes travel over several connections.
//!
//! From the end of the preparation to the last image, the source cuts what it
//! sends into batches and gives them to its connections in turn; the
//! destination takes them in the same turn. So everything arrives in the order
//! in which it was sent, and of two versions of a page the later one wins.
//! A batch is a head of eight bytes (`u32` length of the content, `u32` length
//! of what follows, little endian) and the content: as it is when the two are
//! equal, else one LZ4 block. A head of zeros ends the stream on that connection.

use serde::{Deserialize, Serialize};

use crate::wire::FrameError;

/// Most connections that carry pages: beyond that neither bandwidth nor cores
/// are gained.
pub const STREAMS_MAX: u32 = 16;

/// Bytes of a batch's head.
pub const BATCH_HEAD_BYTES: usize = 8;

/// Most bytes in a batch: what a lane encrypts and writes in one go. Small
/// enough to stay in a core's cache, large enough that handing it to the lane
/// costs nothing.
pub const BATCH_BYTES_MAX: usize = 256 << 10;

/// What stands before each batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHead {
    /// Bytes of the content; zero ends the stream.
    pub raw_bytes: usize,
    /// Bytes that follow: as many, or fewer when they are an LZ4 block.
    pub stored_bytes: usize,
}

impl BatchHead {
    /// The end of the stream.
    pub const END: Self = Self {
        raw_bytes: 0,
        stored_bytes: 0,
    };

    /// The content is one LZ4 block.
    #[must_use]
    pub fn packed(&self) -> bool {
        self.stored_bytes < self.raw_bytes
    }

    /// Encodes the head.
    ///
    /// # Errors
    ///
    /// No legal head.
    pub fn encode(&self) -> Result<[u8; BATCH_HEAD_BYTES], FrameError> {
        self.checked()?;
        // Both are far below 4 GiB, see `checked`.
        let mut head = [0; BATCH_HEAD_BYTES];
        let (raw, stored) = head.split_at_mut(BATCH_HEAD_BYTES / 2);
        raw.copy_from_slice(&self.raw_bytes.to_le_bytes()[..4]);
        stored.copy_from_slice(&self.stored_bytes.to_le_bytes()[..4]);
        Ok(head)
    }

    /// Decodes a head.
    ///
    /// # Errors
    ///
    /// More than a batch may hold, or more stored than there is.
    pub fn decode(head: [u8; BATCH_HEAD_BYTES]) -> Result<Self, FrameError> {
        let [r0, r1, r2, r3, s0, s1, s2, s3] = head;
        let head = Self {
            raw_bytes: u32::from_le_bytes([r0, r1, r2, r3]) as usize,
            stored_bytes: u32::from_le_bytes([s0, s1, s2, s3]) as usize,
        };
        head.checked()?;
        Ok(head)
    }

    fn checked(&self) -> Result<(), FrameError> {
        if self.raw_bytes > BATCH_BYTES_MAX {
            return Err(FrameError::TooLarge {
                announced: self.raw_bytes,
                limit: BATCH_BYTES_MAX,
            });
        }
        if self.stored_bytes > self.raw_bytes || (self.stored_bytes == 0) != (self.raw_bytes == 0) {
            return Err(FrameError::Malformed { what: "batch head" });
        }
        Ok(())
    }
}

/// When batches are compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compress {
    /// When it is faster than the connection, as measured.
    #[default]
    Auto,
    /// Never.
    None,
    /// Always, where it makes a batch smaller.
    Lz4,
}

/// What to do with a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Send it as it is.
    Plain,
    /// Compress all of it.
    Lz4,
    /// Compress a little of it to learn what that gains, and send it as it is.
    Sample,
}

/// Decides whether compression pays, from what writing and compressing have
/// cost so far. Costs are picoseconds a byte, as moving averages.
#[derive(Debug, Clone)]
pub struct Gauge {
    choice: Compress,
    /// What a written byte has cost, waiting for the network included.
    write_ps: Option<u64>,
    /// What it costs at least, by `--bandwidth`.
    write_ps_min: u64,
    /// What compressing a byte costs, and how many bytes of a thousand are left.
    pack: Option<(u64, u64)>,
    since_sample: u32,
}

impl Gauge {
    /// Below this cost of a written byte compression cannot pay: 500 MB/s a
    /// lane is more than LZ4 takes in on one core.
    const WORTH_A_LOOK_PS: u64 = 2000;

    /// One batch in so many shows whether compression would pay now.
    const SAMPLE_EVERY: u32 = 32;

    /// Weight of the latest batch in a moving average: one eighth.
    const WEIGHT: u64 = 8;

    /// Knows nothing yet.
    #[must_use]
    pub fn new(choice: Compress) -> Self {
        Self {
            choice,
            write_ps: None,
            write_ps_min: 0,
            pack: None,
            since_sample: Self::SAMPLE_EVERY,
        }
    }

    /// The stream is held to so many bytes a second, over so many lanes.
    pub fn limit(&mut self, bytes_per_s: Option<u64>, lanes: u32) {
        self.write_ps_min = bytes_per_s.map_or(0, |rate| {
            (1_000_000_000_000 / rate.max(1)).saturating_mul(u64::from(lanes))
        });
    }

    /// What to do with the next batch.
    pub fn decide(&mut self) -> Packing {
        match self.choice {
            Compress::None => return Packing::Plain,
            Compress::Lz4 => return Packing::Lz4,
            Compress::Auto => {}
        }
        let write_ps = self.write_ps.unwrap_or(0).max(self.write_ps_min);
        if write_ps < Self::WORTH_A_LOOK_PS {
            return Packing::Plain;
        }
        self.since_sample = self.since_sample.saturating_add(1);
        match self.pack {
            Some((pack_ps, left)) if pays(write_ps, pack_ps, left) => Packing::Lz4,
            _ if self.since_sample >= Self::SAMPLE_EVERY => {
                self.since_sample = 0;
                Packing::Sample
            }
            _ => Packing::Plain,
        }
    }

    /// So many bytes went out in so many nanoseconds.
    pub fn wrote(&mut self, bytes: usize, took_ns: u64) {
        if let Some(ps) = ps_a_byte(bytes, took_ns) {
            let before = self.write_ps.unwrap_or(ps);
            self.write_ps = Some(blend(before, ps));
        }
    }

    /// Compressing so many bytes took so long and left so many.
    pub fn packed(&mut self, raw_bytes: usize, left_bytes: usize, took_ns: u64) {
        if let Some(ps) = ps_a_byte(raw_bytes, took_ns) {
            let left = (left_bytes as u64).saturating_mul(1000) / (raw_bytes as u64).max(1);
            let (ps_before, left_before) = self.pack.unwrap_or((ps, left));
            self.pack = Some((blend(ps_before, ps), blend(left_before, left)));
        }
    }
}

fn ps_a_byte(bytes: usize, took_ns: u64) -> Option<u64> {
    took_ns.saturating_mul(1000).checked_div(bytes as u64)
}

fn blend(before: u64, now: u64) -> u64 {
    before - before / Gauge::WEIGHT + now / Gauge::WEIGHT
}

/// Compressing and writing what is left costs less than writing everything,
/// by a tenth at least, so that a draw does not burn the tree's CPU.
fn pays(write_ps: u64, pack_ps: u64, left_of_1000: u64) -> bool {
    let packed = u128::from(pack_ps) * 1000 + u128::from(write_ps) * u128::from(left_of_1000);
    packed * 10 < u128::from(write_ps) * 1000 * 9
}

/// Holds a stream to a rate: bytes may go as they are paid for by time.
#[derive(Debug, Clone)]
pub struct Bucket {
    bytes_per_s: u64,
    /// Bytes that may go at once; below zero they went ahead of their time.
    credit_bytes: i128,
    last_us: u64,
}

impl Bucket {
    /// Time whose bytes may go at once after a pause, in microseconds.
    const BURST_US: u64 = 20_000;

    /// Full at the moment `now_us` of any steady clock.
    #[must_use]
    pub fn new(bytes_per_s: u64, now_us: u64) -> Self {
        let bytes_per_s = bytes_per_s.max(1);
        Self {
            bytes_per_s,
            credit_bytes: Self::burst_bytes(bytes_per_s),
            last_us: now_us,
        }
    }

    fn burst_bytes(bytes_per_s: u64) -> i128 {
        i128::from(bytes_per_s) * i128::from(Self::BURST_US) / 1_000_000
    }

    /// Takes bytes out and says how long to wait before they are sent, in
    /// microseconds.
    pub fn take(&mut self, bytes: usize, now_us: u64) -> u64 {
        let elapsed_us = now_us.saturating_sub(self.last_us);
        self.last_us = self.last_us.max(now_us);
        let rate = i128::from(self.bytes_per_s);
        self.credit_bytes = (self.credit_bytes + i128::from(elapsed_us) * rate / 1_000_000)
            .min(Self::burst_bytes(self.bytes_per_s));
        self.credit_bytes -= bytes as i128;
        if self.credit_bytes >= 0 {
            return 0;
        }
        u64::try_from(-self.credit_bytes * 1_000_000 / rate).unwrap_or(u64::MAX)
    }

    /// Bytes that were taken were not sent after all: they were compressed.
    pub fn give_back(&mut self, bytes: usize) {
        self.credit_bytes += bytes as i128;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn heads_that_mean_nothing_are_refused() {
        for (raw_bytes, stored_bytes) in [
            (1, 0),
            (0, 1),
            (10, 11),
            (BATCH_BYTES_MAX + 1, 1),
            (BATCH_BYTES_MAX + 1, BATCH_BYTES_MAX + 1),
        ] {
            let head = BatchHead {
                raw_bytes,
                stored_bytes,
            };
            assert!(head.encode().is_err(), "{head:?}");
            let mut bytes = [0; BATCH_HEAD_BYTES];
            bytes[..4].copy_from_slice(&u32::try_from(raw_bytes).unwrap().to_le_bytes());
            bytes[4..].copy_from_slice(&u32::try_from(stored_bytes).unwrap().to_le_bytes());
            assert!(BatchHead::decode(bytes).is_err(), "{head:?}");
        }
        assert_eq!(BatchHead::decode([0; 8]), Ok(BatchHead::END));
    }

    const BATCH: usize = BATCH_BYTES_MAX;

    /// Nanoseconds for a batch at a rate.
    fn at(mb_per_s: u64) -> u64 {
        BATCH as u64 * 1000 / mb_per_s
    }

    /// What is done with each of many batches, after some to learn from.
    fn decisions(gauge: &mut Gauge, link_mb_per_s: u64, lz4_mb_per_s: u64, left: usize) -> Packing {
        let mut last = Packing::Plain;
        for _ in 0..200 {
            last = gauge.decide();
            match last {
                Packing::Plain => gauge.wrote(BATCH, at(link_mb_per_s)),
                Packing::Sample => {
                    gauge.packed(BATCH, BATCH * left / 100, at(lz4_mb_per_s));
                    gauge.wrote(BATCH, at(link_mb_per_s));
                }
                Packing::Lz4 => {
                    let bytes = BATCH * left / 100;
                    gauge.packed(BATCH, bytes, at(lz4_mb_per_s));
                    gauge.wrote(bytes, at(link_mb_per_s) * left as u64 / 100);
                }
            }
        }
        last
    }

    #[test]
    fn compression_follows_the_slower_of_link_and_compressor() {
        let auto = || Gauge::new(Compress::Auto);
        assert_eq!(decisions(&mut auto(), 100, 500, 50), Packing::Lz4);
        // The link is as fast as the compressor, or there is nothing to gain.
        assert_ne!(decisions(&mut auto(), 450, 500, 50), Packing::Lz4);
        assert_ne!(decisions(&mut auto(), 100, 500, 99), Packing::Lz4);
        // Nothing is even tried on a link that no compressor keeps up with.
        assert_eq!(decisions(&mut auto(), 900, 2000, 10), Packing::Plain);
        // It follows the data, in both directions.
        let mut gauge = auto();
        assert_eq!(decisions(&mut gauge, 100, 500, 40), Packing::Lz4);
        assert_ne!(decisions(&mut gauge, 100, 500, 100), Packing::Lz4);
        assert_eq!(decisions(&mut gauge, 100, 500, 40), Packing::Lz4);
        // What the user says counts.
        assert_eq!(
            decisions(&mut Gauge::new(Compress::None), 1, 500, 1),
            Packing::Plain
        );
        assert_eq!(
            decisions(&mut Gauge::new(Compress::Lz4), 9000, 1, 100),
            Packing::Lz4
        );
    }

    #[test]
    fn a_cap_counts_as_a_slow_link() {
        let mut gauge = Gauge::new(Compress::Auto);
        gauge.limit(Some(10_000_000), 2);
        assert_eq!(decisions(&mut gauge, 5000, 500, 50), Packing::Lz4);
        gauge.limit(None, 2);
        assert_eq!(decisions(&mut gauge, 5000, 500, 50), Packing::Plain);
    }

    proptest! {
        #[test]
        fn heads_round_trip(bytes: [u8; BATCH_HEAD_BYTES]) {
            if let Ok(head) = BatchHead::decode(bytes) {
                prop_assert_eq!(head.encode(), Ok(bytes));
            }
        }

        #[test]
        fn a_bucket_keeps_the_rate(
            rate in 1_000u64..10_000_000_000,
            takes in prop::collection::vec((1usize..BATCH_BYTES_MAX, 0u64..50_000, 0usize..100), 1..200),
        ) {
            let mut bucket = Bucket::new(rate, 0);
            let (mut now_us, mut sent) = (0u64, 0u128);
            for (bytes, pause_us, unsent_percent) in takes {
                now_us += pause_us;
                now_us += bucket.take(bytes, now_us) + 1;
                let unsent = bytes * unsent_percent / 100;
                bucket.give_back(unsent);
                sent += (bytes - unsent) as u128;
                // What has gone was paid for by time, but for one burst.
                let paid = u128::from(rate) * u128::from(now_us + Bucket::BURST_US) / 1_000_000;
                prop_assert!(sent <= paid + 1, "{sent} > {paid}");
            }
        }

        #[test]
        fn a_full_stream_is_not_held_below_its_rate(rate in 1_000_000u64..10_000_000_000) {
            let mut bucket = Bucket::new(rate, 0);
            let (mut now_us, mut sent) = (0u64, 0u128);
            for _ in 0..1000 {
                now_us += bucket.take(BATCH_BYTES_MAX, now_us);
                sent += BATCH_BYTES_MAX as u128;
            }
            let at_rate_us = sent * 1_000_000 / u128::from(rate);
            prop_assert!(u128::from(now_us) <= at_rate_us);
        }
    }
}
