package main

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"github.com/hallmark-id/hallmark/pkg/cli"
)

const cliHead = `# Commands

<!-- Made by "make generate" from the commands themselves. -->

Every command has ` + "`--help`" + `, which says what is here. Data goes to the standard
output, remarks and errors to the standard error.

| exit status | meaning |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | wrong usage |
| 3 | not found |
| 4 | denied |
| 5 | the server or the agent cannot be reached |

`

// cliPage returns the reference of the commands.
func cliPage() []byte {
	var b bytes.Buffer
	b.WriteString(cliHead)
	root := cli.Command()
	contents(&b, root)
	describe(&b, root)
	return b.Bytes()
}

func contents(b *bytes.Buffer, cmd *cobra.Command) {
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			indent := strings.Repeat("  ", strings.Count(c.CommandPath(), " ")-1)
			fmt.Fprintf(b, "%s- [%s](#%s): %s\n", indent, c.CommandPath(), strings.ReplaceAll(c.CommandPath(), " ", "-"), c.Short)
			contents(b, c)
		}
	}
}

// describe writes what there is to say of the commands below one.
func describe(b *bytes.Buffer, parent *cobra.Command) {
	for _, c := range parent.Commands() {
		if !c.IsAvailableCommand() {
			continue
		}
		fmt.Fprintf(b, "\n## %s\n\n%s\n", c.CommandPath(), sentences(c.Long))
		if !c.HasAvailableSubCommands() {
			fmt.Fprintf(b, "\n```\n%s\n```\n", c.UseLine())
		}
		fmt.Fprintf(b, "\n```sh\n%s\n```\n", unindent(c.Example))
		if flags := strings.TrimRight(c.LocalFlags().FlagUsages(), "\n "); flags != "" {
			fmt.Fprintf(b, "\n```\n%s\n```\n", unindent(flags))
		}
		describe(b, c)
	}
}

var placeholder = regexp.MustCompile(`<([a-z]+)>`)

// sentences keeps Markdown from reading placeholders as tags.
func sentences(text string) string { return placeholder.ReplaceAllString(text, "&lt;$1>") }

func unindent(text string) string {
	lines := strings.Split(strings.Trim(text, "\n"), "\n")
	for i, l := range lines {
		lines[i] = strings.TrimPrefix(l, "  ")
	}
	return strings.Join(lines, "\n")
}
