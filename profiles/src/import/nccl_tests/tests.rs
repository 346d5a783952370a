use super::*;
use proptest::prelude::*;

fn skip(text: &str) -> NcclLog {
    read(text, Strictness::Skip).unwrap()
}

const V2: &str = "\
# nThread 1 nGpus 1 minBytes 1024 maxBytes 2048 step: 2(factor) warmup iters: 5 iters: 20 agg iters: 1 validation: 1 graph: 0
#
# Using devices
#  Rank  0 Group  0 Pid  33385 on alpha device  0 [0x10] NVIDIA A100-SXM4-40GB
#  Rank  1 Group  0 Pid  33386 on beta device  0 [0000:19:00] NVIDIA A100-SXM4-40GB
alpha:33385:33385 [7] NCCL INFO cudaDriverVersion 12060
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
        1024           256     float     sum      -1    180.3    0.01    0.01      0    179.3    0.01    0.01    N/A
  1073741824     268435456     float     sum      -1    26420   40.64   76.20      0    26500   40.52   75.97      0
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 38.0
";

#[test]
fn current_logs() {
    let log = skip(V2);
    assert_eq!(log.runs.len(), 1);
    assert_eq!(
        (log.runs[0].ranks, log.runs[0].hosts.len(), log.runs[0].gpus.as_slice()),
        (Some(2), 2, ["NVIDIA A100-SXM4-40GB".to_owned()].as_slice())
    );
    assert_eq!(log.rows.len(), 2);
    assert_eq!((log.rows[1].bytes, log.rows[1].line), (1 << 30, 11));
    let half = log.rows[1].out_of_place.unwrap();
    assert!((half.seconds - 0.02642).abs() < 1e-9 && half.busbw == 76.2);
    let bandwidth = log.rows[1].bus_bandwidth().unwrap();
    assert!((bandwidth / 76.2e9 - 1.0).abs() < 1e-3, "{bandwidth}");
    assert!(log.malformed.is_empty());
    let line = log.fit(0).unwrap();
    assert!((line.latency_seconds / 179.3e-6 - 1.0).abs() < 0.02, "{line:?}");
}

/// Without root and operation, with an integer time that looks like a root, behind a launcher's prefix, in two runs.
#[test]
fn old_logs_and_launchers() {
    let text = "\
[1,0]<stdout>:#       size         count    type   redop     time   algbw   busbw  error     time   algbw   busbw  error
[1,0]<stdout>:#        (B)    (elements)                     (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
[1,0]<stdout>:        1024            32   float            28.52    0.04    0.03  0e+00    27.43    0.04    0.03  1e+00
[1,0]<stdout>:   536870912      16777216   float            10028   53.54   50.19  0e+00    10149   52.90   49.60  0e+00
12: #       size         count    type   time   algbw   busbw  error
12:         2048             0   half    [3]  1.5    0.04    0.03  0e+00
";
    let log = skip(text);
    assert_eq!(log.runs.len(), 2);
    assert_eq!(log.rows.len(), 3);
    assert!((log.rows[1].out_of_place.unwrap().seconds - 0.010028).abs() < 1e-12);
    assert_eq!(log.runs[0].counted_ranks, Some(8));
    assert_eq!((log.rows[2].in_place, log.rows[2].run), (None, 1));
}

#[test]
fn torn_rows_are_named_and_refused_on_demand() {
    let torn =
        V2.replace("   26420   40.64   76.20      0    26500   40.52   75.97      0", "node0: Test CUDA failure");
    let log = skip(&torn);
    assert_eq!(log.rows.len(), 1);
    assert_eq!(log.malformed.len(), 1);
    let error = read(&torn, Strictness::Refuse).unwrap_err().to_string();
    assert!(error.contains("line 11") && error.contains("time"), "{error}");
    assert!(log.fit(0).is_err());
    assert_eq!(read("hello\nworld", Strictness::Skip), Err(LogError::NoTable { lines: 2 }));
}

/// Milliseconds in the first version.
#[test]
fn the_first_version() {
    let text = "      bytes             N    type      op     time  algbw  busbw      res     time  algbw  busbw      res\n    10000000      10000000    char     sum    1.234   8.10   8.10    0e+00    1.200   8.33   8.33    0e+00\n";
    let log = skip(text);
    assert!((log.rows[0].seconds().unwrap() - 1.2e-3).abs() < 1e-12);
}

proptest! {
    /// Whatever stands in a file, it is read or refused, never a panic; what is read is finite.
    #[test]
    fn any_text_is_survived(text in "[ -~\n]{0,400}") {
        let _ = read(&text, Strictness::Skip);
    }

    #[test]
    fn damaged_logs_are_survived(cut in 0usize..900, junk in "[ -~\n]{0,30}", strict: bool) {
        let mut text = V2.to_owned();
        let cut = cut.min(text.len());
        text.insert_str(cut, &junk);
        let strictness = if strict { Strictness::Refuse } else { Strictness::Skip };
        if let Ok(log) = read(&text, strictness) {
            for row in &log.rows {
                prop_assert!(row.seconds().is_some_and(f64::is_finite));
                prop_assert!(row.bus_bandwidth().is_none_or(f64::is_finite));
            }
        }
    }
}
