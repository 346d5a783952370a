//! The buffers of one rank: allocated when the program says so, counted as they are.
//!
//! The counts are measurements: they come from the blocks that the device gave, not from the sizes that the program
//! states, so that predicted and measured peaks are two numbers. Freed blocks are kept for the next buffer of the same size,
//! because a step that asks the system for memory pays for fresh pages inside its kernels; kept blocks are not live, and
//! are reported beside the peak.

use paceline_kernels::{Block, DType, Device, KernelError};
use paceline_sim::program::MemoryClass;
use std::collections::{BTreeMap, HashMap};

/// Number of memory classes.
const CLASSES: usize = MemoryClass::ALL.len();

/// What a rank's memory held over time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryReport {
    /// Highest sum of live bytes.
    pub peak_bytes: u64,
    /// Live bytes by class at the first moment of the peak.
    pub peak_by_class: BTreeMap<MemoryClass, u64>,
    /// Most bytes held from the system, kept blocks included.
    pub reserved_bytes: u64,
}

/// Live and peak bytes by class.
#[derive(Debug, Clone)]
struct Meter {
    live: [u64; CLASSES],
    total: u64,
    peak: u64,
    peak_by_class: [u64; CLASSES],
}

impl Meter {
    fn grow(&mut self, class: MemoryClass, bytes: u64) {
        self.live[class as usize] += bytes;
        self.total += bytes;
    }

    fn shrink(&mut self, class: MemoryClass, bytes: u64) {
        self.live[class as usize] -= bytes;
        self.total -= bytes;
    }

    fn note_peak(&mut self) {
        if self.total > self.peak {
            self.peak = self.total;
            self.peak_by_class = self.live;
        }
    }
}

struct Held {
    class: MemoryClass,
    block: Box<dyn Block>,
}

/// The memory of one rank. Buffers are numbered as in its program.
pub struct RankMemory<'d> {
    device: &'d dyn Device,
    held: Vec<Option<Held>>,
    kept: HashMap<usize, Vec<Box<dyn Block>>>,
    meter: Meter,
    reserved: u64,
    most_reserved: u64,
    poison: bool,
}

impl<'d> RankMemory<'d> {
    /// Room for `buffers` buffers, none allocated. With `poison`, new buffers are filled with NaN, so that a kernel that
    /// reads what nobody wrote spoils the loss.
    pub fn new(device: &'d dyn Device, buffers: usize, poison: bool) -> RankMemory<'d> {
        RankMemory {
            device,
            held: std::iter::repeat_with(|| None).take(buffers).collect(),
            kept: HashMap::new(),
            meter: Meter { live: [0; CLASSES], total: 0, peak: 0, peak_by_class: [0; CLASSES] },
            reserved: 0,
            most_reserved: 0,
            poison,
        }
    }

    /// Starts the life of a buffer. Panics when it already lives: the program's check excludes that.
    pub fn allocate(&mut self, buffer: usize, class: MemoryClass, bytes: u64) -> Result<(), KernelError> {
        assert!(self.held[buffer].is_none(), "buffer b{buffer} is allocated twice");
        let wanted = usize::try_from(bytes)
            .map_err(|_| KernelError::OutOfMemory { device: self.device.name(), bytes: usize::MAX })?;
        let block = match self.kept.get_mut(&wanted).and_then(Vec::pop) {
            Some(block) => block,
            None => {
                let block = self.device.allocate(wanted)?;
                self.reserved += block.bytes() as u64;
                self.most_reserved = self.most_reserved.max(self.reserved);
                block
            }
        };
        if self.poison {
            let nan = f32::NAN.to_ne_bytes().repeat(block.bytes() / 4);
            let view = block.view(0, block.bytes() / 4, DType::F32);
            // SAFETY: the block was just allocated; no other view of it exists.
            unsafe { self.device.upload(&nan, view) }?;
        }
        self.meter.grow(class, block.bytes() as u64);
        self.held[buffer] = Some(Held { class, block });
        Ok(())
    }

    /// Ends the life of a buffer. Panics when it does not live: the program's check excludes that.
    pub fn free(&mut self, buffer: usize) {
        let Some(held) = self.held[buffer].take() else { panic!("buffer b{buffer} is freed twice") };
        let bytes = held.block.bytes();
        self.meter.shrink(held.class, bytes as u64);
        self.kept.entry(bytes).or_default().push(held.block);
    }

    /// The block of a living buffer.
    pub fn block(&self, buffer: usize) -> Option<&(dyn Block + 'static)> {
        self.held[buffer].as_ref().map(|held| &*held.block)
    }

    /// Takes note of the present total, after all allocations or frees of an op; returns it.
    pub fn settle(&mut self) -> u64 {
        self.meter.note_peak();
        self.meter.total
    }

    /// What was held so far.
    pub fn report(&self) -> MemoryReport {
        let by_class = MemoryClass::ALL.into_iter().zip(self.meter.peak_by_class).filter(|&(_, bytes)| bytes > 0);
        MemoryReport {
            peak_bytes: self.meter.peak,
            peak_by_class: by_class.collect(),
            reserved_bytes: self.most_reserved,
        }
    }
}
