use super::*;
use proptest::prelude::*;

fn machine() -> Machine {
    Machine { device: "cpu".into(), host: "A \"fast\" one, really".into(), cores: 2 }
}

fn row(subject: Subject) -> Row {
    Row {
        subject,
        busy_devices: 2,
        context: None,
        median_seconds: 1.25e-3,
        spread_seconds: 0.0,
        repetitions: 31,
        source: Source::Measured,
        date: "2026-11-21".into(),
        versions: "paceline 0.1.0".into(),
    }
}

fn matmul(m: u32) -> Subject {
    Subject::Kernel(KernelKey::new(KernelOp::MatmulNt, &[m, 768, 256]).unwrap())
}

fn text(profile: &Profile) -> String {
    let mut bytes = Vec::new();
    profile.write(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

fn sample() -> Profile {
    let subjects = [
        matmul(512),
        Subject::Transfer { bytes: 4096 },
        Subject::Collective { round: CollectiveRound::Gather, members: 4, bytes: 1 << 20 },
        Subject::Overhead(Overhead::Message),
    ];
    Profile { machine: machine(), rows: subjects.map(row).to_vec() }
}

/// The sample with one field of its first data line (which is that of the matrix product) replaced.
fn with(column: &str, value: &str) -> Result<Profile, ProfileError> {
    let mut lines: Vec<String> = text(&sample()).lines().map(String::from).collect();
    let index = COLUMNS.iter().position(|&c| c == column).unwrap();
    // The machine's quoted name comes after all columns that are replaced here.
    let mut fields: Vec<&str> = lines[1].splitn(index + 2, ',').collect();
    fields[index] = value;
    lines[1] = fields.join(",");
    Profile::read(lines.join("\n").as_bytes())
}

#[test]
fn the_file_is_this() {
    let profile = Profile { machine: machine(), rows: vec![row(matmul(512))] };
    assert_eq!(
        text(&profile),
        "format,kind,op,shape,dtype,busy_devices_count,context,median_seconds,spread_seconds,repetitions_count,source,device,\
         host,cores_count,date_utc,versions\n\
         paceline.profile/1,kernel,matmul-nt,m=512;n=768;k=256,f32,2,,1.25e-3,0e0,31,measured,cpu,\
         \"A \"\"fast\"\" one, really\",2,2026-11-21,paceline 0.1.0\n"
    );
}

#[test]
fn a_file_leads_back() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("profile.csv");
    let profile = sample();
    profile.save(&path).unwrap();
    profile.save(&path).unwrap();
    assert_eq!(Profile::load(&path).unwrap(), Profile::read(text(&profile).as_bytes()).unwrap());
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    let missing = Profile::load(&folder.path().join("no.csv")).unwrap_err();
    assert!(missing.to_string().contains("no.csv"), "{missing}");
}

#[test]
fn newer_formats_and_wrong_headers_are_refused() {
    match with("format", "paceline.profile/2") {
        Err(error @ ProfileError::Format { line: 2, .. }) => assert!(error.to_string().contains("paceline.profile/2")),
        other => panic!("{other:?}"),
    }
    let header = text(&sample()).replacen("median_seconds", "median_ms", 1);
    match Profile::read(header.as_bytes()) {
        Err(ProfileError::Header { column: 8, found, expected: "median_seconds" }) => assert_eq!(found, "median_ms"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(Profile::read("".as_bytes()), Err(ProfileError::Empty)));
    let header_only = text(&sample()).lines().next().unwrap().to_string();
    assert!(matches!(Profile::read(header_only.as_bytes()), Err(ProfileError::Empty)));
}

#[test]
fn each_malformed_value_is_named_with_its_line() {
    for (column, value) in [
        ("kind", "kernels"),
        ("op", "matmul"),
        ("shape", "m=512;n=768"),
        ("shape", "m=512;n=768;k=-1"),
        ("busy_devices_count", "0"),
        ("context", "recompute=never"),
        ("median_seconds", "0"),
        ("median_seconds", "-1e-3"),
        ("median_seconds", "nan"),
        ("median_seconds", "inf"),
        ("median_seconds", "1 ms"),
        ("spread_seconds", "-1"),
        ("repetitions_count", "1.5"),
        ("source", "guessed"),
    ] {
        match with(column, value) {
            Err(error @ ProfileError::Value { line: 2, column: named, .. }) => {
                assert_eq!(named, column, "{error}");
                assert!(error.to_string().contains(value), "{error}");
            }
            other => panic!("{column} = {value}: {other:?}"),
        }
    }
    let short = text(&sample()).replace(",paceline 0.1.0", "");
    assert!(matches!(Profile::read(short.as_bytes()), Err(ProfileError::Csv { line: 2, .. })));
}

#[test]
fn two_machines_in_one_file_are_refused_and_another_machine_is_noticed() {
    let second = text(&Profile { machine: Machine { cores: 64, ..machine() }, ..sample() });
    let both = text(&sample()) + second.split_once('\n').unwrap().1;
    match Profile::read(both.as_bytes()) {
        Err(error @ ProfileError::TwoMachines { line: 6, .. }) => {
            assert!(error.to_string().contains("with 64 cores") && error.to_string().contains("with 2 cores"));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(sample().made_elsewhere(&machine()), None);
    let here = Machine { host: "Another".into(), ..machine() };
    let warning = sample().made_elsewhere(&here).unwrap().to_string();
    assert!(warning.contains("A \"fast\" one, really") && warning.contains("Another"), "{warning}");
}

fn subjects() -> impl Strategy<Value = Subject> {
    let parts = (0..KernelOp::ALL.len(), prop::collection::vec(1u32.., 5), 0..DType::ALL.len());
    let kernel = parts.prop_map(|(op, dims, dtype)| {
        let op = KernelOp::ALL[op];
        Subject::Kernel(KernelKey::new(op, &dims[..op.dimensions().len()]).unwrap().with(DType::ALL[dtype]))
    });
    prop_oneof![
        kernel,
        (1u64..).prop_map(|bytes| Subject::Transfer { bytes }),
        (0..2usize, 1u32.., 1u64..).prop_map(|(round, members, bytes)| Subject::Collective {
            round: CollectiveRound::ALL[round],
            members,
            bytes
        }),
        (0..Overhead::ALL.len()).prop_map(|n| Subject::Overhead(Overhead::ALL[n])),
    ]
}

fn rows() -> impl Strategy<Value = Row> {
    let times = (1e-9f64..1e3, 0f64..1.0);
    let run = (1u32.., 0..=6usize);
    (subjects(), run, times, 1u64.., 0..3usize, "[ -~]{0,12}", "\\PC{0,12}").prop_map(
        |(subject, run, (median_seconds, spread_seconds), repetitions, source, date, versions)| Row {
            subject,
            busy_devices: run.0,
            context: Context::all().nth(run.1),
            median_seconds,
            spread_seconds,
            repetitions,
            source: Source::ALL[source],
            date,
            versions,
        },
    )
}

proptest! {
    #[test]
    fn every_profile_leads_back(rows in prop::collection::vec(rows(), 1..20), host in "\\PC{0,12}") {
        let mut profile = Profile { machine: Machine { host, ..machine() }, rows };
        let read = Profile::read(text(&profile).as_bytes()).unwrap();
        // Writing sorts.
        profile.rows.sort_by_key(|row| (row.subject.clone(), row.source, row.busy_devices, row.context));
        prop_assert_eq!(read, profile);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(Profile::read(&bytes[..]).is_err());
    }

    #[test]
    fn damaged_files_never_panic(at in 0..2000usize, byte: u8, cut in 0..2000usize) {
        let mut bytes = text(&sample()).into_bytes();
        let at = at % bytes.len();
        bytes[at] = byte;
        bytes.truncate(bytes.len() - cut % bytes.len());
        // Damage inside a text or a digit may go unnoticed; then the rows that were read still make sense.
        if let Ok(profile) = Profile::read(&bytes[..]) {
            prop_assert!(profile.rows.iter().all(|row| row.median_seconds > 0.0 && row.repetitions > 0));
        }
    }
}

#[test]
fn the_shipped_profile_foretells_shapes_it_has_not_seen() {
    let profile = Profile::read(&include_bytes!("../../data/cpu.csv")[..]).unwrap();
    assert!(profile.rows.iter().all(|row| row.source == Source::Measured && row.repetitions >= 3));
    let residuals = crate::Predictor::new(&profile).unwrap().residuals().unwrap();
    for op in [KernelOp::MatmulNn, KernelOp::MatmulNt, KernelOp::MatmulTn, KernelOp::AttentionBackward] {
        let of_op = residuals.iter().find(|residual| residual.class == crate::Class::Kernel(op, DType::F32)).unwrap();
        assert!(of_op.points >= 16 && of_op.median_error.unwrap() < 0.1, "{of_op:?}");
    }
}

#[test]
fn newer_rows_replace_what_they_measure_again() {
    let mut profile = sample();
    let slower = Row { median_seconds: 7.0, ..row(matmul(512)) };
    let traced = Row { source: Source::Trace, ..row(matmul(512)) };
    let newer = Profile { machine: machine(), rows: vec![slower.clone(), traced.clone(), row(matmul(64))] };
    profile.update(newer).unwrap();
    assert_eq!(profile.rows.len(), 6, "four, one of them replaced, a time inside a run, and a new shape");
    assert_eq!(profile.rows.iter().filter(|row| row.subject == matmul(512)).collect::<Vec<_>>(), [&slower, &traced]);

    let before = profile.clone();
    let elsewhere = Machine { cores: 64, ..machine() };
    let message = profile.update(Profile::new(elsewhere)).unwrap_err().to_string();
    assert!(message.contains("64 cores") && message.contains("2 cores"), "{message}");
    assert_eq!(profile, before);
}
