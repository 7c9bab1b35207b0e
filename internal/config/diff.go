package config

import "reflect"

// Diff returns the keys of the settings in which two configurations differ and which a running proxy
// cannot take over: they take effect at the next start. Settings that it can take over (routes and
// their rules, the log level, what readiness requires, passwords in files) are not listed. Only keys
// are returned, no values.
func Diff(old, new *Config) (restart []string) {
	ours, next := *old, *new
	ours.leaveOut()
	next.leaveOut()
	theirs := map[string]any{}
	for path, s := range settings(reflect.ValueOf(&next).Elem()) {
		theirs[path] = s.value.Interface()
	}
	for path, s := range settings(reflect.ValueOf(&ours).Elem()) {
		if !s.hot && !reflect.DeepEqual(s.value.Interface(), theirs[path]) {
			restart = append(restart, path)
		}
	}
	return restart
}
