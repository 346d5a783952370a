//! Sizes in bytes as people write them.

/// Parses `1048576`, `512MiB`, `80GiB`, `80GB` (powers of 1024 with an `i`, of 1000 without).
///
/// # Errors
/// Says what is allowed.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = (&text[..digits], text[digits..].trim());
    let factor: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err("not a size; write bytes, or a number with KiB, MiB, GiB, TiB (or KB, MB, GB, TB)".into()),
    };
    let value: f64 =
        number.parse().map_err(|_| "not a size; write a number, with a unit such as GiB if you like".to_string())?;
    let bytes = value * factor as f64;
    if bytes < 1e18 { Ok(bytes.round() as u64) } else { Err("larger than any memory".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_powers_of_1024_with_an_i() {
        assert_eq!(parse_bytes("80GiB"), Ok(80 << 30));
        assert_eq!(parse_bytes("1.5 MiB"), Ok(3 << 19));
        assert_eq!(parse_bytes("80GB"), Ok(80_000_000_000));
        assert_eq!(parse_bytes("77"), Ok(77));
        for wrong in ["", "GiB", "-1", "1.2.3", "5 parsecs", "1e400", "99999999999TiB"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }
}
