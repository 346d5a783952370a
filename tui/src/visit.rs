//! What is kept from one visit to the next, job by job, in a small file: knobs, views and colours.

use crate::app::{App, View};
use crate::event::Effect;
use crate::plans::{Shape, Sort};
use crate::settings::{Settings, place_of};
use crate::theme::Palette;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::{fs, io};

/// The last visit to a job.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Visit {
    /// The job as it was: when it has changed since, its values count and not the knobs of the visit.
    pub job: String,
    /// Values of the knobs.
    pub knobs: BTreeMap<String, String>,
    /// The knob with the focus.
    pub knob: String,
    /// The view.
    pub view: View,
    /// The order of plans.
    pub sort: Sort,
    /// How plans are shown.
    pub shape: Shape,
    /// The filter of plans.
    pub filter: String,
    /// Steps of a run, where they were chosen.
    pub steps: Option<u64>,
    /// The colours, where they were chosen.
    pub palette: Option<Palette>,
}

impl Visit {
    /// Of a state. `job` are the keys of the job that was opened.
    pub fn of(app: &App, job: &toml::Table) -> Visit {
        Visit {
            job: job.to_string(),
            knobs: app.settings.values().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
            knob: crate::settings::KNOBS[app.knob].key.to_owned(),
            view: app.view,
            sort: app.plans.sort,
            shape: app.plans.shape,
            filter: app.plans.filter.clone(),
            steps: app.training.steps_wanted,
            palette: (app.palette != Palette::Mono).then_some(app.palette),
        }
    }

    /// Reads the file of a visit; a file that is not there or cannot be read is no visit.
    pub fn read(path: &Path) -> Option<Visit> {
        toml::from_str(&fs::read_to_string(path).ok()?).ok()
    }

    /// Writes the file.
    ///
    /// # Errors
    /// When the folder cannot be made or the file not written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let text = toml::to_string(self).map_err(io::Error::other)?;
        fs::write(path, text)
    }

    /// The settings to begin with: those of the visit when the job is as it was.
    pub fn settings(&self, job: &toml::Table) -> Settings {
        let mut settings = Settings::from_table(job);
        if self.job == job.to_string() {
            for place in 0..crate::settings::KNOBS.len() {
                settings.reset(place);
            }
            for (key, value) in &self.knobs {
                if let Some(place) = place_of(key)
                    // A value that is refused now was written by another version: the job's stays.
                    && settings.set(place, value).is_ok()
                {
                    settings.several.retain(|several| several != key);
                }
            }
        }
        settings
    }

    /// The view and the focus; returns the first question.
    pub fn restore(&self, app: &mut App) -> Vec<Effect> {
        let mut effects = app.show(self.view);
        if let Some(place) = place_of(&self.knob) {
            app.knob = place;
        }
        (app.plans.sort, app.plans.shape) = (self.sort, self.shape);
        app.plans.filter.clone_from(&self.filter);
        app.training.steps_wanted = self.steps;
        effects.push(app.ask());
        effects
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_visit_is_kept_until_the_job_changes() {
        let job: toml::Table = "model = 'gpt2'\nseq = 1024\nglobal_batch = 8\npp = 2".parse().unwrap();
        let (mut app, _) = App::new(Settings::from_table(&job), Palette::Light, None);
        app.settings.turn(place_of("pp").unwrap(), true);
        app.settings.reset(place_of("nodes").unwrap());
        app.knob = place_of("tp").unwrap();
        app.plans.sort = Sort::Memory;
        app.training.steps_wanted = Some(7);
        let folder = std::env::temp_dir().join(format!("paceline-visit-{}", std::process::id()));
        let path = folder.join("deep").join("visit.toml");
        Visit::of(&app, &job).write(&path).unwrap();
        let visit = Visit::read(&path).unwrap();
        assert_eq!((visit.settings(&job).get("pp"), visit.palette), (Some("4"), Some(Palette::Light)));
        let (mut again, _) = App::new(visit.settings(&job), Palette::Dark, None);
        visit.restore(&mut again);
        assert_eq!(again.knob, app.knob);
        assert_eq!((again.plans.sort, again.training.steps_wanted), (Sort::Memory, Some(7)));
        let mut changed = job.clone();
        changed.insert("pp".into(), toml::Value::Integer(8));
        assert_eq!(visit.settings(&changed).get("pp"), Some("8"));
        fs::write(&path, "no = [toml").unwrap();
        assert_eq!(Visit::read(&path), None);
        fs::remove_dir_all(&folder).unwrap();
    }
}
