package cli_test

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/hallmark-id/hallmark/pkg/cli"
)

// leaves returns the commands that do something, by their path.
func leaves(cmd *cobra.Command) map[string]*cobra.Command {
	out := map[string]*cobra.Command{}
	for _, c := range cmd.Commands() {
		if c.HasSubCommands() {
			for path, leaf := range leaves(c) {
				out[path] = leaf
			}
		} else if c.IsAvailableCommand() {
			out[c.CommandPath()] = c
		}
	}
	return out
}

// withoutOutput are the commands that have no -o, and why.
var withoutOutput = map[string]string{
	"hallmark dev":                "runs until it is stopped",
	"hallmark demo mtls":          "shows what happens as it happens",
	"hallmark server run":         "runs until it is stopped",
	"hallmark agent run":          "runs until it is stopped",
	"hallmark server validate":    "prints no data: the file is valid, or an error",
	"hallmark agent validate":     "prints no data: the file is valid, or an error",
	"hallmark server schema":      "prints JSON",
	"hallmark agent schema":       "prints JSON",
	"hallmark server backup":      "writes a file",
	"hallmark server restore":     "reads a file",
	"hallmark entry delete":       "prints no data: what it was given is gone",
	"hallmark node evict":         "prints no data: what it was given is gone",
	"hallmark node ban":           "prints no data: what it was given is banned",
	"hallmark bundle delete":      "prints no data: what it was given is gone",
	"hallmark federation delete":  "prints no data: what it was given is gone",
	"hallmark federation refresh": "prints no data: it is done",
	"hallmark completion":         "prints code of a shell",

	"hallmark credential aws":        "prints JSON that AWS SDKs read, or writes a file",
	"hallmark credential gcp":        "prints JSON that Google's libraries read",
	"hallmark credential azure":      "writes a file",
	"hallmark credential kubernetes": "prints JSON that clients of Kubernetes read",
}

func TestEveryCommandThatPrintsDataPrintsItForMachinesToo(t *testing.T) {
	all := leaves(cli.Command())
	for path, c := range all {
		flag := c.Flags().Lookup("output")
		switch why := withoutOutput[path]; {
		case flag == nil && why == "":
			t.Errorf("%q has no -o json|yaml", path)
		case flag != nil && why != "":
			t.Errorf("%q has -o, and is said to have none as it %s", path, why)
		case flag != nil:
			for _, format := range []string{"json", "yaml"} {
				if err := flag.Value.Set(format); err != nil {
					t.Errorf("%q -o %s: %v", path, format, err)
				}
			}
		}
	}
	for path := range withoutOutput {
		if all[path] == nil {
			t.Errorf("there is no command %q", path)
		}
	}
}

var (
	substitution = regexp.MustCompile(`"?[$<]\(([^()]*)\)"?`)
	shellEnd     = regexp.MustCompile(` ([|>&;#]|2>).*`)
)

// hallmarkCalls returns the calls of hallmark in a line of shell, as words. A
// value that comes from another command is the word "substituted".
func hallmarkCalls(line string) (calls [][]string) {
	for _, m := range substitution.FindAllStringSubmatch(line, -1) {
		calls = append(calls, hallmarkCalls(m[1])...)
	}
	line = shellEnd.ReplaceAllString(substitution.ReplaceAllString(line, "substituted"), "")
	words := strings.Fields(line)
	if len(words) == 0 || words[0] != "hallmark" {
		return calls
	}
	for i, w := range words {
		words[i] = strings.Trim(w, `"'`)
	}
	return append(calls, words[1:])
}

func TestEveryExampleIsACallThatTheCommandTakes(t *testing.T) {
	calls := 0
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		own := false // one of them calls this command, or one below
		for line := range strings.Lines(c.Example) {
			for _, words := range hallmarkCalls(line) {
				calls++
				path, err := parse(words)
				if err != nil {
					t.Errorf("example of %q: hallmark %s: %v", c.CommandPath(), strings.Join(words, " "), err)
				}
				own = own || path == c.CommandPath() || strings.HasPrefix(path, c.CommandPath()+" ")
			}
		}
		if !own && c.IsAvailableCommand() {
			t.Errorf("%q has no example of its own", c.CommandPath())
		}
		for _, below := range c.Commands() {
			if below.IsAvailableCommand() {
				walk(below)
			}
		}
	}
	walk(cli.Command())
	if calls < 50 {
		t.Errorf("only %d calls were found in the examples", calls)
	}
}

// parse finds the command that words call, and checks its flags and arguments.
func parse(words []string) (path string, err error) {
	root := cli.Command()
	c, rest, err := root.Find(words)
	if err != nil {
		return "", err
	}
	c.InitDefaultHelpFlag()
	if err := c.ParseFlags(rest); err != nil {
		return "", err
	}
	args := c.Flags().Args()
	if c.HasSubCommands() && len(args) > 0 {
		return "", fmt.Errorf("there is no command %q", args[0])
	}
	return c.CommandPath(), c.ValidateArgs(args)
}
