//! Jobs as people write them, rightly and wrongly.

use super::*;
use proptest::prelude::*;

fn job(text: &str) -> Result<Job, JobError> {
    Job::from_table(text.parse().unwrap(), "job.toml")
}

const LEAST: &str = "model = 'demo-1m'\nseq = 64\nglobal_batch = 16\n";

#[test]
fn a_job_fixes_what_it_names_and_leaves_the_rest() {
    let least = job(LEAST).unwrap();
    assert_eq!((least.seq, least.global_batch, least.tokens_per_step()), (64, 16, 1024));
    assert!(least.dp.is_empty() && least.schedule.is_empty() && least.recompute.is_empty());
    assert_eq!((least.cluster.as_str(), least.memory_limit, least.train.clone()), ("local", None, Train::default()));

    let full = job(&format!(
        "{LEAST}dp = 2\nmicro_batch = [4, 1, 2, 1]\nschedule = ['gpipe', '1f1b']\nrecompute = 'full'\nstates = ['NNG', 'mics', 'iig']\ngroup_size = 2\npipeline_groups = 1\nprefetch = 0\nkeep_gathered = true\nlate_gather = true\ncollectives = 'ring'\nlink_bandwidth = '10MB'\nlink_latency = 1e-3\n\
         memory_limit = '1.5 GiB'\ntp = 1\n[train]\nsteps = 7\nlr = 2e-3\nclip = 0\n"
    ))
    .unwrap();
    assert_eq!((full.dp.as_slice(), full.micro_batch.as_slice()), (&[2][..], &[1, 2, 4][..]));
    assert_eq!(full.schedule, ["1f1b", "gpipe"]);
    let letters: Vec<String> = full.states.iter().map(StatePartition::letters).collect();
    assert_eq!((full.recompute, letters), (vec![Recompute::Full], vec!["NNG".into(), "III".into(), "IIG".into()]));
    assert_eq!(
        full.sharing,
        Sharing {
            group_size: Some(2),
            pipeline_groups: 1,
            prefetch: 0,
            keep_gathered: true,
            late_gather: true,
            collectives: Collectives::Ring,
            link: Some(Link { latency: Nanos(1_000_000), bytes_per_second: 10_000_000 }),
        }
    );
    assert_eq!(full.memory_limit, Some(3 << 29));
    assert_eq!((full.train.steps, full.train.lr, full.train.min_lr, full.train.clip), (7, 2e-3, 2e-4, None));
}

#[test]
fn wrong_jobs_are_told_what_is_wrong_and_what_is_allowed() {
    let cases = [
        ("modle = 'gpt2'", &["unknown key modle", "did you mean model?"][..]),
        ("seq = 'long'", &["seq = \"long\"", "a whole number from 1"]),
        ("seq = 0", &["seq = 0"]),
        ("global_batch = -4", &["global_batch = -4"]),
        ("global_batch = 4000000000", &["global_batch = 4000000000", "at seq = 64"]),
        ("micro_batch = 5", &["micro_batch = 5", "a divisor of global_batch = 16: 1, 2, 4, 8, 16"]),
        ("dp = [3, 5]", &["dp = [3, 5]", "global_batch = 16"]),
        ("dp = []", &["dp = []", "leave the key out"]),
        ("pp = 9", &["pp = 9", "8 blocks"]),
        ("pp = 4\nchunks = 4", &["pp * chunks = 16", "at most 8"]),
        ("schedule = 'zigzag'", &["schedule = \"zigzag\"", "gpipe, 1f1b"]),
        ("recompute = true", &["recompute = true", "none, selective, full"]),
        ("states = 'zero9'", &["states = \"zero9\"", "zero1"]),
        ("group_size = 0", &["group_size = 0"]),
        ("barrier_every = 0", &["barrier_every = 0"]),
        ("barrier_every = 65", &["barrier_every = 65", "1 to 64"]),
        ("keep_gathered = 1", &["keep_gathered = 1", "true or false"]),
        ("keep_gathered = true\nstates = ['zero1', 'NII']", &["keep_gathered = true", "NNG, NII", "I or G", "leave"]),
        ("tp = 2", &["tp = 2", "local", "allowed there: 1"]),
        ("trainable = 2", &["trainable = 2", "at most 1"]),
        ("trainable = 'lora:0'", &["lora:0", "lora:R"]),
        ("trainable = 'lora:8:q,z'", &["trainable = lora:8:q,z", "no matrix \"z\"", "q, k, v, o, gate, up, down"]),
        ("trainable = true", &["trainable = true", "a share"]),
        ("precision = 'fp8'", &["precision = \"fp8\"", "fp32, bf16, bf16-fp32-gradients"]),
        ("memory_limit = 'lots'", &["memory_limit = \"lots\"", "80GiB"]),
        ("memory_limit = 0", &["memory_limit = 0"]),
        ("model = 'gpt5'", &["gpt5", "demo-1m"]),
        ("model = '/nowhere/config.json'", &["/nowhere/config.json"]),
        ("model = 3", &["model = 3", "preset"]),
        ("train = 4", &["train = 4", "a table"]),
        ("[train]\nsteps = 0", &["train.steps = 0"]),
        ("[train]\nlr = -1", &["train.lr = -1", "above 0"]),
        ("[train]\nmin_lr = 5", &["train.min_lr = 5", "from 0 to lr"]),
        ("[train]\nsteeps = 5", &["unknown key train.steeps", "train.steps"]),
    ];
    for (lines, expected) in cases {
        let mut table: toml::Table = LEAST.parse().unwrap();
        table.extend(lines.parse::<toml::Table>().unwrap());
        let error = Job::from_table(table, "job.toml").expect_err(lines).to_string();
        for part in expected {
            assert!(error.contains(part), "{lines}: {error}");
        }
    }
    let missing = job("model = 'gpt2'\nseq = 8").unwrap_err().to_string();
    assert!(missing.contains("global_batch is missing"), "{missing}");
    let long = job("model = 'gpt2'\nseq = 2048\nglobal_batch = 4").unwrap_err().to_string();
    assert!(long.contains("seq = 2048") && long.contains("1024"), "{long}");
}

#[test]
fn files_flags_and_paths() {
    let folder = std::env::temp_dir().join(format!("paceline-job-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("job.toml");
    std::fs::write(folder.join("text.txt"), "words").unwrap();
    std::fs::write(&path, format!("{LEAST}pp = 2\n[train]\ndata = 'text.txt'\n")).unwrap();
    let flags: toml::Table = "pp = 4\nseq = 32".parse().unwrap();
    let read = Job::read_with(&path, flags).unwrap();
    assert_eq!((read.pp.as_slice(), read.seq), (&[4][..], 32));
    let data = read.train.data.clone().unwrap();
    assert!(Path::new(&data).is_absolute() && data.ends_with("text.txt"));
    assert_eq!(Job::from_table(read.table().clone(), "plan").unwrap(), read);

    std::fs::write(&path, "model = ").unwrap();
    assert!(Job::read(&path).unwrap_err().to_string().contains("not a TOML document"));
    assert!(Job::read(&folder.join("none.toml")).unwrap_err().to_string().contains("none.toml"));
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn sizes_with_units() {
    let sizes = [("80GiB", Some(80 << 30)), ("40 GB", Some(40_000_000_000)), ("0.5kib", Some(512)), ("77", Some(77))];
    for (text, bytes) in sizes.into_iter().chain(["", "GiB", "-1", "1.2.3", "5 parsecs", "0", "1e9"].map(|t| (t, None)))
    {
        assert_eq!(fields::parse_bytes(text), bytes, "{text}");
    }
}

proptest! {
    /// Whatever a file holds, reading it ends with a job or an error, never otherwise.
    #[test]
    fn any_text_is_a_job_or_an_error(text in "(model|seq|global_batch|dp|pp|[a-z_]{1,12}|train|\\[train\\]|=|[0-9]{1,12}|'[a-z0-9/.-]{0,9}'|\n|\\[|\\]|,| ){0,40}") {
        if let Ok(table) = text.parse::<toml::Table>()
            && let Err(error) = Job::from_table(table, "fuzz")
        {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn values_of_any_type_are_a_job_or_an_error(key in proptest::sample::select(KEYS), value in prop_oneof![
        any::<i64>().prop_map(toml::Value::Integer),
        any::<f64>().prop_map(toml::Value::Float),
        any::<bool>().prop_map(toml::Value::Boolean),
        ".{0,20}".prop_map(toml::Value::String),
        proptest::collection::vec(any::<i64>().prop_map(toml::Value::Integer), 0..4).prop_map(toml::Value::Array),
    ]) {
        let mut table: toml::Table = LEAST.parse().unwrap();
        table.insert(key.into(), value);
        if let Err(error) = Job::from_table(table, "fuzz") {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
