//! The buffers of one rank: allocated when the program says so, counted as they are.
//!
//! The rank of a program has one block, its arena, in which every buffer has its place from the begin ([`arena`]); a step
//! asks for no memory. What has no plan (evaluation) gets blocks of its own, which are kept for the next buffer of the same size.
//! The counts are of what lives: the whole of what is held from the device is reported beside the peak.

use paceline_kernels::{Block, DType, Device, KernelError};
use paceline_sim::arena;
use paceline_sim::program::{MemoryClass, RankProgram};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};

/// Number of memory classes.
const CLASSES: usize = MemoryClass::ALL.len();

/// What a rank's memory held over time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// Highest sum of live bytes.
    pub peak_bytes: u64,
    /// Live bytes by class at the first moment of the peak.
    pub peak_by_class: BTreeMap<MemoryClass, u64>,
    /// Most bytes held from the device: the arena, or all blocks.
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

/// A buffer's place in an arena.
struct Place {
    address: u64,
    bytes: usize,
}

impl Block for Place {
    fn address(&self) -> u64 {
        self.address
    }

    fn bytes(&self) -> usize {
        self.bytes
    }
}

/// An arena with its plan.
struct Planned {
    block: Box<dyn Block>,
    offsets: Vec<Option<u64>>,
}

/// Buffers of an arena begin at multiples of this: what the widest copies of any device ask for.
pub const ALIGNMENT: u64 = 256;

/// The memory of one rank. Buffers are numbered as in its program.
pub struct RankMemory<'d> {
    device: &'d dyn Device,
    held: Vec<Option<Held>>,
    kept: HashMap<usize, Vec<Box<dyn Block>>>,
    arena: Option<Planned>,
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
            arena: None,
            meter: Meter { live: [0; CLASSES], total: 0, peak: 0, peak_by_class: [0; CLASSES] },
            reserved: 0,
            most_reserved: 0,
            poison,
        }
    }

    /// The arena of a rank, none of its buffers alive.
    pub fn planned(device: &'d dyn Device, rank: &RankProgram, poison: bool) -> Result<RankMemory<'d>, KernelError> {
        let plan = arena::plan(rank, ALIGNMENT);
        let bytes = usize::try_from(plan.bytes)
            .map_err(|_| KernelError::OutOfMemory { device: device.name(), bytes: usize::MAX })?;
        let mut memory = RankMemory::new(device, rank.buffers.len(), poison);
        memory.arena = Some(Planned { block: device.allocate(bytes)?, offsets: plan.offsets });
        (memory.reserved, memory.most_reserved) = (plan.bytes, plan.bytes);
        Ok(memory)
    }

    /// Starts the life of a buffer, for the work of `on`: the device or a queue of it. Panics when it already lives: the program's check
    /// excludes that.
    pub fn allocate(
        &mut self,
        buffer: usize,
        class: MemoryClass,
        bytes: u64,
        on: &dyn Device,
    ) -> Result<(), KernelError> {
        assert!(self.held[buffer].is_none(), "buffer b{buffer} is allocated twice");
        let wanted = usize::try_from(bytes)
            .map_err(|_| KernelError::OutOfMemory { device: self.device.name(), bytes: usize::MAX })?;
        let planned = self.arena.as_ref().and_then(|arena| arena.offsets[buffer].map(|at| arena.block.address() + at));
        let kept = || self.kept.get_mut(&wanted).and_then(Vec::pop);
        let block =
            match planned.map(|address| Box::new(Place { address, bytes: wanted }) as Box<dyn Block>).or_else(kept) {
                Some(block) => block,
                None => {
                    let block = self.device.allocate(wanted)?;
                    self.reserved += block.bytes() as u64;
                    self.most_reserved = self.most_reserved.max(self.reserved);
                    block
                }
            };
        if self.poison {
            // Whatever the format, all ones are not a number; as an index they are beyond every table.
            let nan = vec![u8::MAX; block.bytes()];
            let view = block.view(0, block.bytes() / 2, DType::BF16);
            // SAFETY: the block was just allocated; where it had been another buffer's, that one's work comes before that of `on`.
            unsafe { on.upload(&nan, view) }?;
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
        if self.arena.is_none() {
            self.kept.entry(bytes).or_default().push(held.block);
        }
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
