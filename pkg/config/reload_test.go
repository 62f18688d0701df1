package config_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/hallmark-id/hallmark/pkg/config"
)

type reloadable struct {
	Name   string   `yaml:"name"`
	IDs    []string `yaml:"ids"`
	Hidden int
	Log    config.Log `yaml:"log"`
	Part   *struct {
		Size int `yaml:"size"`
	} `yaml:"part"`
	Embedded `yaml:",inline"`
}

// Embedded has keys of the struct that it is in.
type Embedded struct {
	Wait config.Duration `yaml:"wait"`
}

func TestDiffNamesTheKeysThatDiffer(t *testing.T) {
	decode := func(text string) (r reloadable) {
		if err := config.Decode(config.Source{Data: []byte(text)}, &r); err != nil {
			t.Fatal(err)
		}
		return r
	}
	const base = "name: a\nids: [x]\nlog: {level: info}\npart: {size: 1}\nwait: 1s\n"
	for text, want := range map[string]string{
		base: "",
		"name: b\nids: [x, y]\nlog: {level: debug, format: json}\npart: {size: 2}\nwait: 2s\n": "name ids log.level log.format part.size wait",
		"name: a\nids: [x]\nlog: {level: info}\nwait: 1s\n":                                    "part",
	} {
		var got []string
		for _, d := range config.Diff(decode(base), decode(text)) {
			got = append(got, d.Path)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q: got %v, want %s", text, got, want)
		}
	}
}

func TestFollowReadsTheFileAgainWhenItIsTold(t *testing.T) {
	file := filepath.Join(t.TempDir(), "c.yaml")
	var log bytes.Buffer
	reload, done := make(chan os.Signal), make(chan struct{})
	var seen []string
	var fail error
	ctx, cancel := context.WithCancel(t.Context())
	src := config.Source{Name: file, Reload: reload, Set: []config.Setting{{Path: "name", Value: "set"}}}
	var following sync.WaitGroup
	following.Go(func() {
		config.Follow(ctx, src, slog.New(slog.NewTextHandler(&log, nil)), func(s config.Source) (applied, restart []config.Difference, err error) {
			seen = append(seen, fmt.Sprint(string(s.Data), s.Set[0].Value))
			defer func() { done <- struct{}{} }()
			return []config.Difference{{Path: "log.level", Old: "info", New: "debug"}}, []config.Difference{{Path: "join", Old: "secret1", New: "secret2"}}, fail
		})
	})
	for _, text := range []string{"one ", "two "} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		reload <- os.Interrupt
		<-done
	}
	fail = errors.New("c.yaml:1: wrong")
	reload <- os.Interrupt
	<-done
	os.Remove(file)
	reload <- os.Interrupt
	cancel()
	following.Wait()
	if got := strings.Join(seen, "|"); got != "one set|two set|two set" {
		t.Errorf("read %q", got)
	}
	for text, times := range map[string]int{
		"key=log.level from=info to=debug": 2, "keys=join": 2, "c.yaml:1: wrong": 1, "no such file": 1, "secret": 0,
	} {
		if n := strings.Count(log.String(), text); n != times {
			t.Errorf("%q was logged %d times instead of %d:\n%s", text, n, times, log.String())
		}
	}
}
