//! Round trips, PyTorch's own small examples, and every mistake with its place.

use super::*;
use crate::schedules::{PlacementKind, Request, SCHEDULES, build};
use proptest::prelude::*;

#[test]
fn round_trip_of_every_schedule() {
    for schedule in SCHEDULES.iter().filter(|s| s.placement != PlacementKind::Bidirectional && s.name != "1f1b-r") {
        for (p, m) in [(2, 2), (2, 6), (4, 4), (4, 12), (5, 10), (8, 16)] {
            let order = build(schedule.name, &Request::new(p, m)).unwrap();
            for layout in [Layout::Dense, Layout::Slots] {
                let text = write(&order, layout).unwrap();
                assert_eq!(read(&text, schedule.name).as_ref(), Ok(&order), "{} p={p} m={m}", schedule.name);
            }
        }
    }
}

#[test]
fn what_pytorch_cannot_express() {
    let dual = build("dualpipe", &Request::new(4, 8)).unwrap();
    assert_eq!(write(&dual, Layout::Dense), Err(CsvError::TwoCopies { name: "dualpipe".into() }));
    // Recomputation happens inside PyTorch's backward.
    let recomputed = build("1f1b-r", &Request::new(4, 8)).unwrap();
    let plain = build("1f1b", &Request::new(4, 8)).unwrap();
    assert_eq!(write(&recomputed, Layout::Dense), write(&plain, Layout::Dense));
}

#[test]
fn letters_are_mapped() {
    let order = build("zb-h1", &Request::new(2, 2)).unwrap();
    assert_eq!(write(&order, Layout::Dense).unwrap(), "0F0,0F1,0I0,0W0,0I1,0W1\n1F0,1I0,1F1,1I1,1W0,1W1\n");
    let order = build("1f1b", &Request::new(2, 2)).unwrap();
    assert_eq!(write(&order, Layout::Slots).unwrap(), "0F0,0F1,,,0B0,,,0B1\n,1F0,1B0,,1F1,1B1\n");
}

#[test]
fn a_v_shape_by_hand_with_blanks_and_overlap() {
    let text = "\u{feff}0F0, 0F1,3F0,3B0,\"0F2\",(3F1;3B1)OVERLAP_F_B,0B0,3F2,3B2,0B1,0B2\r\n\
                1F0,2F0,,1F1,2F1,2B0,1B0,1F2,2F2,2B1,1B1,2B2,1B2\r\n\r\n";
    let order = read(text, "mine").unwrap();
    assert_eq!(order.placement, v_shape(2));
    assert_eq!((order.name.as_str(), order.microbatches), ("mine", 3));
    assert_eq!(order.actions[0][5..7], [action(Pass::F, 3, 1), action(Pass::BW, 3, 1)]);
    let custom = read("1F0,1B0\n0F0,0B0\n", "swapped").unwrap();
    assert_eq!(custom.placement, Placement { name: "custom".into(), device_of_stage: vec![1, 0], copies: 1 });
}

#[test]
fn mistakes_are_located() {
    let message = |text: &str| read(text, "x").unwrap_err().to_string();
    let cases = [
        ("", "the file has no action; one row per rank is expected, for example `0F0,0F1,0B0,0B1`"),
        (",,\n,", "the file has no action; one row per rank is expected, for example `0F0,0F1,0B0,0B1`"),
        ("0F0,0B0\n\n1F0,1B0", "row 2 (rank 1) has no action; every rank needs at least one stage"),
        (
            "0F0,0X0",
            "row 1, column 2: `0X0` is no action; cells are <stage>F|I|W|B<microbatch>, (<cell>;<cell>)OVERLAP_F_B, or empty",
        ),
        (
            "0F0,0SEND_F0,0B0",
            "row 1, column 2: `0SEND_F0` is communication; give the compute-only form, the sends and receives are added when it is used",
        ),
        (
            "0F0,0F99999999999,0B0",
            "row 1, column 2: `0F99999999999` names a number that is too large; stages go to 65534, microbatches to 4294967294",
        ),
        (
            "0F0,0B0\n0F1,0B1",
            "row 2, column 1: `0F1` is in row 2, but stage 0 is in row 1 already; a stage lives on one rank",
        ),
        ("0F0,0B0,,0F0", "row 1, column 4: `0F0` is there already, at row 1, column 1; keep one"),
        (
            "0F0,0B0,0W0",
            "row 1, column 3: `0W0` beside `0B0` at row 1, column 2; keep either the full backward B, or I and W",
        ),
        ("0F0,0W0,0I0", "row 1, column 2: `0W0` needs `0I0`, which comes later, at row 1, column 3"),
        ("0B0,0F0", "row 1, column 1: `0B0` needs `0F0`, which comes later, at row 1, column 2"),
        ("0F0,0I0", "row 1, column 2: `0W0` is missing, and its I is here"),
        ("0F0,0W0", "row 1, column 2: `0I0` is missing, and its W is here"),
        ("0F0,0F1,0B0", "row 1, column 2: `0B1` is missing (or I and W), and its F is here"),
        ("0F0,0B0,0B1", "row 1, column 3: `0F1` is missing, and its backward is here"),
        ("0F0,0F1,0B0,0B1\n1F0,1B0", "row 2, column 3: `1F1` is missing: every stage computes every microbatch"),
        ("0F0,0F2,0B0,0B2", "row 1, column 5: `0F1` is missing: every stage computes every microbatch"),
        ("0F0,0B0\n2F0,2B0", "stage 1 is in no row, but stage 2 is; stages count from 0 without gaps"),
        (
            "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1",
            "deadlock: `0B0` (row 1, column 2) waits for `1B0` (row 2, column 3); `1F1` (row 2, column 2) waits for `0F1` (row 1, column 3)",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(message(text), expected, "for {text:?}");
    }
}

proptest! {
    #[test]
    fn nothing_read_panics(text in "([0-9]{0,2}(F|I|W|B|SEND_F|X|;|\\(|\\)OVERLAP_F_B)?[0-9]{0,2}[,\n ]?){0,40}") {
        if let Ok(order) = read(&text, "fuzz") {
            prop_assert_eq!(read(&write(&order, Layout::Dense).unwrap(), "fuzz"), Ok(order));
        }
    }

    #[test]
    fn no_bytes_panic(text in "\\PC*") {
        let _ = read(&text, "fuzz").is_ok();
    }

    /// A valid file with one cell changed, dropped or moved is either refused or still a valid schedule.
    #[test]
    fn damage_is_found(
        row in 0usize..4,
        from in 0usize..24,
        to in 0usize..24,
        kind in 0u8..3,
        name in prop::sample::select(vec!["1f1b", "zb-h1", "v-half", "interleaved"]),
    ) {
        let order = build(name, &Request::new(4, 8)).unwrap();
        let text = write(&order, Layout::Dense).unwrap();
        let mut rows: Vec<Vec<&str>> = text.lines().map(|line| line.split(',').collect()).collect();
        let cells = rows[row].len();
        let (from, to) = (from % cells, to % cells);
        match kind {
            0 => drop(rows[row].remove(from)),
            1 => {
                let cell = rows[row].remove(from);
                rows[row].insert(to, cell);
            }
            _ => rows[row][from] = rows[row][to],
        }
        let damaged: String = rows.iter().map(|row| row.join(",") + "\n").collect();
        match read(&damaged, name) {
            Ok(read) => {
                prop_assert!(kind == 1 || from == to, "accepted after damage {kind}");
                read.validate().unwrap();
            }
            Err(error) => {
                prop_assert!(error.to_string().contains("row"), "{error}");
                prop_assert!(from != to || kind == 0);
            }
        }
    }
}
