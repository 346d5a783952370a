//! The knobs: keys of a job file with one value each, how a value is turned up and down, and what may be typed.

use paceline_planner::configuration::Configuration;
use paceline_planner::job::{LOCAL, parse_bytes};
use paceline_planner::predict::PRECISIONS;
use paceline_planner::schedules;
use paceline_profiles::cluster_names;
use paceline_sim::cluster::Architecture;
use paceline_sim::partition::StatePartition;
use std::collections::BTreeMap;
use std::sync::Arc;
use toml::{Table, Value};

/// What values a knob takes.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// A whole number above zero; turning doubles and halves it.
    Count,
    /// One of a list.
    Word(fn() -> Vec<String>),
    /// One of a list, or the path of a file.
    WordOrFile(fn() -> Vec<String>),
    /// `true` or `false`.
    Switch,
    /// Bytes, with or without a unit.
    Size,
    /// Anything; the prediction judges it.
    Text,
    /// A number above zero that the job file does not know: a budget.
    Budget,
}

/// A knob.
#[derive(Debug, Clone, Copy)]
pub struct Knob {
    /// Key of the job file.
    pub key: &'static str,
    /// For people.
    pub label: &'static str,
    /// Values.
    pub kind: Kind,
    /// One line on what it does.
    pub about: &'static str,
    /// What an absent value means; none for keys that must be there.
    pub usual: Option<&'static str>,
}

fn models() -> Vec<String> {
    Architecture::preset_names()
}

fn clusters() -> Vec<String> {
    std::iter::once(LOCAL.to_string()).chain(cluster_names().map(str::to_owned)).collect()
}

fn schedule_names() -> Vec<String> {
    schedules::names().map(str::to_owned).collect()
}

fn precisions() -> Vec<String> {
    PRECISIONS.iter().map(|(name, _)| (*name).to_owned()).collect()
}

fn states() -> Vec<String> {
    let named = ["none", "zero1", "zero2", "zero3", "mics", "hsdp"].map(str::to_owned);
    // The same by their letters, and all others.
    named.into_iter().chain(StatePartition::all().map(|triple| triple.letters())).collect()
}

fn recomputes() -> Vec<String> {
    ["none", "selective", "full"].map(str::to_owned).to_vec()
}

fn attentions() -> Vec<String> {
    ["naive", "fused", "flash"].map(str::to_owned).to_vec()
}

const fn knob(
    key: &'static str,
    label: &'static str,
    kind: Kind,
    usual: Option<&'static str>,
    about: &'static str,
) -> Knob {
    Knob { key, label, kind, about, usual }
}

/// All knobs, as they are listed.
pub const KNOBS: [Knob; 24] = [
    knob("model", "model", Kind::WordOrFile(models), None, "a preset, or the path of a config.json"),
    knob("cluster", "cluster", Kind::WordOrFile(clusters), Some("local"), "a preset, a TOML file, or this machine"),
    knob("nodes", "nodes", Kind::Count, Some("1"), "nodes of the cluster"),
    knob("gpus_per_node", "GPUs per node", Kind::Count, Some("all"), "devices of a node that are used"),
    knob("seq", "sequence", Kind::Count, None, "tokens of a sequence"),
    knob("global_batch", "global batch", Kind::Count, None, "sequences of an iteration over all replicas"),
    knob("micro_batch", "microbatch", Kind::Count, Some("1"), "sequences of a microbatch"),
    knob("tp", "TP", Kind::Count, Some("1"), "tensor-parallel ranks"),
    knob("sp", "SP", Kind::Switch, Some("with TP"), "sequence parallelism inside the tensor-parallel group"),
    knob("cp", "CP", Kind::Count, Some("1"), "context-parallel ranks"),
    knob("pp", "PP", Kind::Count, Some("1"), "pipeline-parallel ranks"),
    knob("chunks", "chunks", Kind::Count, Some("usual"), "stages of each pipeline rank"),
    knob("ep", "EP", Kind::Count, Some("1"), "expert-parallel ranks"),
    knob("dp", "DP", Kind::Count, Some("the rest"), "replicas"),
    knob(
        "states",
        "states",
        Kind::Word(states),
        Some("usual"),
        "how parameters, gradients and optimizer states are cut",
    ),
    knob("group_size", "group size", Kind::Count, Some("a node"), "ranks of a group within which states are cut"),
    knob("schedule", "schedule", Kind::Word(schedule_names), Some("1f1b"), "pipeline schedule"),
    knob(
        "recompute",
        "recompute",
        Kind::Word(recomputes),
        Some("none"),
        "activations that the backward pass computes again",
    ),
    knob("precision", "precision", Kind::Word(precisions), Some("usual"), "number formats"),
    knob("attention", "attention", Kind::Word(attentions), Some("flash"), "attention kernel"),
    knob("memory_limit", "memory limit", Kind::Size, Some("device"), "most bytes of a device, such as 80GiB"),
    knob("trainable", "trainable", Kind::Text, Some("full"), "full, a share such as 1/16, or lora:R"),
    knob("tokens", "tokens", Kind::Budget, Some("-"), "tokens to train on, such as 15e12: days and cost"),
    knob("price", "$ per GPU-hour", Kind::Budget, Some("-"), "price of a device for an hour"),
];

/// The place of a knob in [`KNOBS`].
pub fn place_of(key: &str) -> Option<usize> {
    KNOBS.iter().position(|knob| knob.key == key)
}

/// Values of the knobs, and what else the job says.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Settings {
    values: BTreeMap<&'static str, String>,
    /// Keys that are no knobs, handed on as they are.
    rest: Table,
    /// Axes for which the job lists several values; the first is set.
    pub several: Vec<&'static str>,
    /// The configuration of a plan for this machine, until a knob is turned: it says more than the knobs do, such as how many
    /// layers each stage has.
    pub opened: Option<Arc<Configuration>>,
}

impl Settings {
    /// The default: something worth looking at.
    pub fn usual() -> Settings {
        let given = [
            ("model", "llama-3-8b"),
            ("cluster", "dgx-h100-ib"),
            ("nodes", "4"),
            ("seq", "8192"),
            ("global_batch", "128"),
            ("tp", "2"),
            ("pp", "2"),
        ];
        Settings { values: given.map(|(key, value)| (key, value.to_string())).into(), ..Settings::default() }
    }

    /// Of a job's keys.
    pub fn from_table(table: &Table) -> Settings {
        let mut settings = Settings::default();
        for (key, value) in table {
            let Some(place) = place_of(key) else {
                settings.rest.insert(key.clone(), value.clone());
                continue;
            };
            let knob = &KNOBS[place];
            let first = match value {
                Value::Array(list) if list.len() > 1 => {
                    settings.several.push(knob.key);
                    &list[0]
                }
                Value::Array(list) if list.len() == 1 => &list[0],
                other => other,
            };
            let text = match first {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            settings.values.insert(knob.key, text);
        }
        settings
    }

    /// The keys of a job: what a job file with these values would hold.
    pub fn table(&self) -> Table {
        let mut table = self.rest.clone();
        for knob in KNOBS.iter().filter(|knob| !matches!(knob.kind, Kind::Budget)) {
            let Some(text) = self.values.get(knob.key) else { continue };
            let value = match (knob.kind, text.parse::<i64>(), text.parse::<bool>()) {
                (Kind::Count | Kind::Size, Ok(number), _) => Value::Integer(number),
                (Kind::Switch, _, Ok(on)) => Value::Boolean(on),
                _ => Value::String(text.clone()),
            };
            table.insert(knob.key.to_owned(), value);
        }
        table
    }

    /// A key of the job that is no knob.
    pub fn rest(&self, key: &str) -> Option<&Value> {
        self.rest.get(key)
    }

    /// A knob's value, where it is set.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.values.get(key).map(String::as_str)
    }

    /// All values that are set.
    pub fn values(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.values.iter().map(|(key, value)| (*key, value.as_str()))
    }

    /// A budget as a number.
    pub fn budget(&self, key: &str) -> Option<f64> {
        self.get(key).and_then(|text| text.parse().ok()).filter(|number: &f64| number.is_finite() && *number > 0.0)
    }

    /// Whether the job is for this machine.
    pub fn is_local(&self) -> bool {
        self.get("cluster").is_none_or(|cluster| cluster == LOCAL)
    }

    /// Sets a knob to what was typed; nothing typed unsets it.
    ///
    /// # Errors
    /// Why not, with what is allowed.
    pub fn set(&mut self, place: usize, typed: &str) -> Result<(), String> {
        let knob = &KNOBS[place];
        let typed = typed.trim();
        if typed.is_empty() {
            if knob.usual.is_none() {
                return Err(format!("{} has to be given", knob.key));
            }
            self.forget_opened(place);
            self.values.remove(knob.key);
            return Ok(());
        }
        let refuse = |allowed: &str| Err(format!("{} = {typed:?}; allowed: {allowed}", knob.key));
        match knob.kind {
            Kind::Count if !typed.parse::<u32>().is_ok_and(|n| n > 0) => return refuse("a whole number from 1 on"),
            Kind::Switch if typed.parse::<bool>().is_err() => return refuse("true, false"),
            Kind::Size if parse_bytes(typed).is_none_or(|bytes| bytes == 0) => {
                return refuse("bytes, or a size such as 80GiB, 512MiB or 40GB");
            }
            Kind::Budget if !typed.parse::<f64>().is_ok_and(|n| n.is_finite() && n > 0.0) => {
                return refuse("a number above 0, such as 15e12");
            }
            Kind::Word(list) if !list().iter().any(|word| word == typed) => {
                return refuse(&list().join(", "));
            }
            _ => {}
        }
        self.forget_opened(place);
        self.values.insert(knob.key, typed.to_owned());
        Ok(())
    }

    /// Unsets a knob, where it may be absent.
    pub fn reset(&mut self, place: usize) {
        if KNOBS[place].usual.is_some() {
            self.forget_opened(place);
            self.values.remove(KNOBS[place].key);
        }
    }

    /// Turns a knob one notch up or down. Numbers double and halve, words go round.
    pub fn turn(&mut self, place: usize, up: bool) {
        self.forget_opened(place);
        let knob = &KNOBS[place];
        let now = self.values.get(knob.key).map(String::as_str);
        let next = match knob.kind {
            Kind::Count => {
                let number: u32 = now.or(knob.usual).and_then(|text| text.parse().ok()).unwrap_or(1);
                match (up, now) {
                    (true, None) if knob.usual.is_some_and(|usual| usual.parse::<u32>().is_err()) => Some(1),
                    (true, _) => Some(number.saturating_mul(2)),
                    (false, None) => None,
                    (false, Some(_)) if number == 1 && knob.usual.is_some() => None,
                    (false, Some(_)) => Some((number / 2).max(1)),
                }
                .map(|number: u32| number.to_string())
            }
            Kind::Word(list) | Kind::WordOrFile(list) => round(&list(), now.or(knob.usual), up),
            Kind::Text => now.map(str::to_owned),
            Kind::Switch => match now {
                None => Some((!up).to_string()),
                Some("true") if up => None,
                Some("true") => Some("false".into()),
                Some(_) if up => Some("true".into()),
                Some(_) => None,
            },
            Kind::Size => {
                let gib = |n: u64| format!("{n}GiB");
                let bytes = now.and_then(parse_bytes).unwrap_or(64 << 30);
                Some(if up { (bytes >> 29).max(1) } else { bytes >> 31 }).filter(|n| *n > 0).map(gib)
            }
            Kind::Budget => {
                let usual = if knob.key == "tokens" { 1e12 } else { 2.0 };
                let number = self.budget(knob.key).map_or(usual, |number| if up { number * 2.0 } else { number / 2.0 });
                Some(if number >= 1e6 { format!("{number:e}") } else { number.to_string() })
            }
        };
        match next {
            Some(value) => drop(self.values.insert(knob.key, value)),
            None => self.reset(place),
        }
    }

    /// Values worth trying for a knob, the one that it has among them.
    pub fn options(&self, place: usize) -> Vec<String> {
        let knob = &KNOBS[place];
        let now = self.get(knob.key);
        match knob.kind {
            Kind::Word(list) | Kind::WordOrFile(list) => {
                let mut words = list();
                if let Some(now) = now.filter(|now| !words.iter().any(|word| word == now)) {
                    words.push(now.to_owned());
                }
                words
            }
            Kind::Count => {
                let now: u32 = now.or(knob.usual).and_then(|text| text.parse().ok()).unwrap_or(1);
                let mut numbers: Vec<u32> = match knob.key {
                    "seq" | "global_batch" | "nodes" => {
                        (0..7).map(|power| (now >> 3).max(1).saturating_mul(1 << power)).collect()
                    }
                    _ => (0..7).map(|power| 1 << power).collect(),
                };
                numbers.push(now);
                numbers.sort_unstable();
                numbers.dedup();
                numbers.into_iter().map(|number| number.to_string()).collect()
            }
            Kind::Switch => vec!["false".into(), "true".into()],
            Kind::Size | Kind::Budget | Kind::Text => Vec::new(),
        }
    }

    /// Another value of a knob is another configuration; a budget is none of its business.
    fn forget_opened(&mut self, place: usize) {
        if !matches!(KNOBS[place].kind, Kind::Budget) {
            self.opened = None;
        }
    }

    /// The same settings with a knob at another value, unchecked.
    pub fn with(&self, place: usize, value: &str) -> Settings {
        let mut other = self.clone();
        if other.get(KNOBS[place].key) != Some(value) {
            other.forget_opened(place);
        }
        other.values.insert(KNOBS[place].key, value.to_owned());
        other
    }
}

fn round(list: &[String], now: Option<&str>, up: bool) -> Option<String> {
    let count = list.len();
    let next = match now.and_then(|now| list.iter().position(|word| word == now)) {
        Some(at) if up => (at + 1) % count,
        Some(at) => (at + count - 1) % count,
        None if up => 0,
        None => count - 1,
    };
    list.get(next).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(key: &str) -> usize {
        place_of(key).unwrap()
    }

    #[test]
    fn turning_doubles_halves_and_goes_round() {
        let mut settings = Settings::usual();
        settings.turn(place("tp"), true);
        assert_eq!(settings.get("tp"), Some("4"));
        for _ in 0..3 {
            settings.turn(place("tp"), false);
        }
        assert_eq!(settings.get("tp"), None);
        settings.turn(place("dp"), true);
        assert_eq!(settings.get("dp"), Some("1"));
        settings.turn(place("recompute"), true);
        assert_eq!(settings.get("recompute"), Some("selective"));
        settings.turn(place("recompute"), false);
        settings.turn(place("recompute"), false);
        assert_eq!(settings.get("recompute"), Some("full"));
        settings.turn(place("seq"), false);
        assert_eq!(settings.get("seq"), Some("4096"));
        settings.turn(place("sp"), false);
        assert_eq!(settings.get("sp"), Some("true"));
        settings.turn(place("memory_limit"), true);
        assert_eq!(settings.get("memory_limit"), Some("128GiB"));
        settings.turn(place("memory_limit"), false);
        assert_eq!(settings.get("memory_limit"), Some("64GiB"));
    }

    #[test]
    fn what_cannot_be_is_refused_with_what_is_allowed() {
        let mut settings = Settings::usual();
        for (key, typed, phrase) in [
            ("tp", "0", "from 1 on"),
            ("tp", "two", "from 1 on"),
            ("sp", "perhaps", "true, false"),
            ("schedule", "zigzag", "zb-h1"),
            ("memory_limit", "lots", "80GiB"),
            ("tokens", "-1", "above 0"),
            ("model", "", "has to be given"),
        ] {
            let before = settings.clone();
            let error = settings.set(place(key), typed).unwrap_err();
            assert!(error.contains(phrase), "{error}");
            assert_eq!(settings, before);
        }
        settings.set(place("tp"), " 8 ").unwrap();
        assert_eq!(settings.get("tp"), Some("8"));
        settings.set(place("tp"), "").unwrap();
        assert_eq!(settings.get("tp"), None);
    }

    #[test]
    fn a_job_goes_in_and_comes_out() {
        let text = "model = 'demo-3m'\nseq = 256\nglobal_batch = 8\nsp = true\nmicro_batch = [2, 4]\nmodle = 'x'\n\
                    memory_limit = '1GiB'\n[train]\nsteps = 3\n";
        let table: Table = text.parse().unwrap();
        let settings = Settings::from_table(&table);
        assert_eq!((settings.get("micro_batch"), settings.several.as_slice()), (Some("2"), &["micro_batch"][..]));
        let mut expected = table.clone();
        expected.insert("micro_batch".into(), Value::Integer(2));
        assert_eq!(settings.table(), expected);
        assert!(settings.is_local());
        assert_eq!(settings.with(place("pp"), "4").table()["pp"].as_integer(), Some(4));
    }
}
