//! The kernels' sources, which travel inside the binary, and a hash to know what was compiled from them.

/// A file of `kernels/cuda`.
pub(super) struct Source {
    /// Without extension.
    pub name: &'static str,
    pub text: &'static str,
}

macro_rules! sources {
    ($($name:literal),* $(,)?) => {
        &[$(Source { name: $name, text: include_str!(concat!("../../cuda/", $name, ".cu")) }),*]
    };
}

/// Every file with kernels.
pub(super) const SOURCES: &[Source] =
    sources!["attention", "attention_plain", "embedding", "head", "norm", "optimizer", "pointwise", "rotary"];

/// What all of them include.
pub(super) const HEADER: Source = Source { name: "gpu.cuh", text: include_str!("../../cuda/gpu.cuh") };

/// What the header includes on a plain C++ compiler.
pub(super) const EMULATOR: Source =
    Source { name: "host/emulator.h", text: include_str!("../../cuda/host/emulator.h") };

/// FNV-1a over texts, each with its end marked: the same on every machine and in every version.
pub(super) fn digest<'a>(texts: impl IntoIterator<Item = &'a str>) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut take = |byte: u8| hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    for text in texts {
        text.bytes().for_each(&mut take);
        take(0xff);
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_tell_texts_and_their_borders_apart() {
        assert_eq!(digest([]), 0xcbf2_9ce4_8422_2325);
        // Published value of FNV-1a for "a", one more step for the mark.
        let a = 0xaf63_dc4c_8601_ec8cu64;
        assert_eq!(digest(["a"]), (a ^ 0xff).wrapping_mul(0x0000_0100_0000_01b3));
        assert_ne!(digest(["ab", "c"]), digest(["a", "bc"]));
    }

    #[test]
    fn every_kernel_file_is_compiled() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
        let mut there: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter_map(|name| name.strip_suffix(".cu").map(str::to_owned))
            .collect();
        there.sort();
        assert_eq!(there, SOURCES.iter().map(|source| source.name).collect::<Vec<_>>());
    }
}
