//! How long the packet path waits for one piece of a move's work: a slice of export or import, a request taken from the
//! agent, an event written to it. The limit that the design sets is 100 microseconds. Time is that of the processor, so
//! that others who use it take nothing away.

use std::time::Duration;

use dataplane::control::codec::{FrameDecoder, encode};
use dataplane::control::{Event, Function, Ordering, Request, ServiceSpec, Timeouts};
use dataplane::{Output, Settings, Worker};
use flow::nat::NatSlices;
use flow::{Batch, Epoch, FlowRecord, GroupId, Micros, MoveId, ServiceId, SiteId, Token};
use nix::time::{ClockId, clock_gettime};

const FLOWS: usize = 100_000;
/// What the source sends as one chunk.
const CHUNK: usize = 4_096;

/// Times of one kind of work, in nanoseconds.
struct Times(&'static str, Vec<u128>);

impl Times {
    fn measure<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let start = thread_time();
        let result = work();
        self.1.push((thread_time() - start).as_nanos());
        result
    }

    #[expect(clippy::print_stdout, reason = "a benchmark prints its figures")]
    fn print(mut self) {
        self.1.sort_unstable();
        let at = |per_mille: usize| self.1[(self.1.len() - 1) * per_mille / 1000] as f64 / 1e3;
        let Self(name, times) = &self;
        println!(
            "{name:<34} {:>6} times: median {:>7.1} us, 99 % {:>7.1} us, longest {:>7.1} us",
            times.len(),
            at(500),
            at(990),
            at(1000)
        );
    }
}

fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("the clock of this thread").into()
}

fn worker(slices: &NatSlices, site: u8) -> Worker<Vec<u8>> {
    let settings = Settings { site: SiteId(site), flow_capacity: FLOWS * 2, ..Settings::default() };
    let mut worker = Worker::new(settings, Micros(0));
    let spec = ServiceSpec {
        service: ServiceId::new(1).expect("an id"),
        function: Function::Nat44(slices.spec().clone()),
        timeouts: Timeouts::default(),
    };
    worker.handle(Request::Services(vec![spec]), Micros(0));
    worker
}

fn prepare(worker: &mut Worker<Vec<u8>>, group: GroupId, move_id: MoveId, epoch: Epoch) {
    let (source, flows, ordering) = (SiteId(9), FLOWS as u64, Ordering::Strict);
    worker.handle(Request::Prepare { group, move_id, epoch, source, flows, ordering }, Micros(0));
}

/// Slices until the worker says `until`.
fn work(worker: &mut Worker<Vec<u8>>, times: &mut Times, until: impl Fn(&Event) -> bool) -> Vec<Event> {
    let (mut out, mut said) = (Output::default(), Vec::new());
    loop {
        times.measure(|| worker.slice(Micros(0), &mut out));
        while let Some(event) = worker.poll_event() {
            let done = until(&event);
            said.push(event);
            if done {
                return said;
            }
        }
    }
}

fn main() {
    let slices = flow::sample::service((FLOWS / 40 + 1) as u32).expect("a service");
    let records = flow::sample::flows(&slices, FLOWS, 1);
    let prefix = slices.spec().clients[0];
    let group = GroupId { service: ServiceId::new(1).expect("an id"), prefix };
    let (move_id, epoch) = (MoveId(1), Epoch(2));
    let mut target = worker(&slices, 1);
    prepare(&mut target, group, move_id, epoch);
    let mut decoding = Times("a chunk decoded and taken", Vec::new());
    let mut installing = Times("a slice of import", Vec::new());
    for (sequence, chunk) in records.chunks(CHUNK).enumerate() {
        let batch = Batch { upserts: chunk.to_vec(), removals: Vec::new() };
        let pieces = Request::install(group, move_id, sequence as u64, &batch);
        for request in pieces {
            let bytes = encode(&request).expect("it encodes");
            let mut decoder = FrameDecoder::<Request>::new();
            decoding.measure(|| {
                decoder.push(&bytes);
                let request = decoder.next().expect("it decodes").expect("it is whole");
                target.handle(request, Micros(0));
            });
        }
        work(&mut target, &mut installing, |event| matches!(event, Event::Installed { .. }));
    }
    let digest = records.iter().fold(0u64, |sum, record: &FlowRecord| sum.wrapping_add(record.digest()));
    let token = Token { epoch, flows: FLOWS as u64, digest };
    let (missing, late_bound_us, cut_bound_us) = (Vec::new(), 0, 0);
    target.handle(Request::Join { group, move_id, token, missing, late_bound_us, cut_bound_us }, Micros(0));
    work(&mut target, &mut installing, |event| matches!(event, Event::Joined { .. }));
    let mut exporting = Times("a slice of export", Vec::new());
    target.handle(Request::CopyStart { group, move_id: MoveId(2), session: 0, credit: u64::MAX }, Micros(0));
    let said = work(&mut target, &mut exporting, |event| matches!(event, Event::RoundEnd { .. }));
    let mut encoding = Times("records written to the agent", Vec::new());
    for event in &said {
        encoding.measure(|| encode(event).expect("it encodes"));
    }
    [decoding, installing, exporting, encoding].into_iter().for_each(Times::print);
}
