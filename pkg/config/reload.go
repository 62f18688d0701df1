package config

import (
	"context"
	"errors"
	"log/slog"
	"reflect"
	"strings"
)

// Difference is a key whose value differs between two configurations.
type Difference struct {
	Path     string // of the key, its parts joined by dots: log.level
	Old, New any
}

// Diff compares two configurations: structs of the same type, or pointers to
// them. It returns the keys that differ, in the order of the type's fields. A
// part that only one of them has is one difference.
func Diff(before, after any) []Difference {
	var out []Difference
	diff(&out, "", reflect.Indirect(reflect.ValueOf(before)), reflect.Indirect(reflect.ValueOf(after)))
	return out
}

func diff(out *[]Difference, path string, a, b reflect.Value) {
	if a.Kind() == reflect.Pointer && !a.IsNil() && !b.IsNil() {
		a, b = a.Elem(), b.Elem()
	}
	if a.Kind() != reflect.Struct {
		if !reflect.DeepEqual(a.Interface(), b.Interface()) {
			*out = append(*out, Difference{path, a.Interface(), b.Interface()})
		}
		return
	}
	for i := range a.NumField() {
		name, options, _ := strings.Cut(a.Type().Field(i).Tag.Get("yaml"), ",")
		at := path
		switch {
		case options == "inline":
		case name == "":
			continue
		case path == "":
			at = name
		default:
			at = path + "." + name
		}
		diff(out, at, a.Field(i), b.Field(i))
	}
}

// Follow reads a configuration's file again each time [Source.Reload] receives,
// until ctx ends. It gives the new configuration, with the same settings over
// it, to apply, which checks it and takes over what it can: it returns the keys
// that it took over and those that differ but need a restart. If it fails, it
// has changed nothing. What came of it is logged; values only of what was taken
// over.
func Follow(ctx context.Context, src Source, log *slog.Logger, apply func(Source) (applied, restart []Difference, err error)) {
	for {
		select {
		case <-src.Reload:
		case <-ctx.Done():
			return
		}
		applied, restart, err := src.again(apply)
		if err != nil {
			log.Error("the configuration was not reloaded; everything stays as it was", "error", err)
			continue
		}
		for _, d := range applied {
			log.Info("configuration changed", "key", d.Path, "from", d.Old, "to", d.New)
		}
		if len(restart) > 0 {
			keys := make([]string, len(restart))
			for i, d := range restart {
				keys[i] = d.Path
			}
			log.Warn("configuration changed, but only a restart puts it in force", "keys", strings.Join(keys, " "))
		}
		log.Info("configuration reloaded", "file", src.Name, "changed", len(applied), "need_restart", len(restart))
	}
}

func (src Source) again(apply func(Source) (applied, restart []Difference, err error)) (applied, restart []Difference, err error) {
	if src.Name == "" {
		return nil, nil, errors.New("there is no file to read: the program was started without one")
	}
	fresh, err := ReadFile(src.Name)
	if err != nil {
		return nil, nil, err
	}
	fresh.Set = src.Set
	return apply(fresh)
}
