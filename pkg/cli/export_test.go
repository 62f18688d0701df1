package cli

import (
	"bytes"
	"context"
	"strings"
	"time"
)

// Help returns a command's help.
func Help(path ...string) string {
	var out bytes.Buffer
	a := &app{in: strings.NewReader(""), out: &out, err: &out, now: time.Now, output: outputTable}
	a.run(context.Background(), append(path, "--help"))
	return out.String()
}

// Commands returns the names of the commands below one.
func Commands(path ...string) []string {
	a := &app{output: outputTable}
	cmd, _, err := a.rootCommand().Find(path)
	if err != nil {
		panic(err)
	}
	var out []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			out = append(out, c.Name())
		}
	}
	return out
}
