package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	"github.com/hallmark-id/hallmark/pkg/config"
)

// choice is a flag that takes one of a few words.
type choice struct {
	value   *string
	choices []string
}

// String returns the value; pflag asks a zero choice too.
func (c *choice) String() string {
	if c.value == nil {
		return ""
	}
	return *c.value
}

func (c *choice) Type() string { return "word" }

func (c *choice) Set(value string) error {
	if !slices.Contains(c.choices, value) {
		return fmt.Errorf("it is one of %s", strings.Join(c.choices, ", "))
	}
	*c.value = value
	return nil
}

func (c *choice) complete(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return c.choices, cobra.ShellCompDirectiveNoFileComp
}

// duration is a flag that takes a length of time.
type duration struct{ config.Duration }

func (d *duration) Type() string { return "duration" }
func (d *duration) String() string {
	if d.Duration == 0 {
		return ""
	}
	return d.Duration.String()
}

func (d *duration) Set(value string) (err error) {
	d.Duration, err = config.ParseDuration(value)
	return err
}

// seconds is the duration in the contracts' unit. It fails if that would lose
// a part.
func (d *duration) seconds(flag string) (int32, error) {
	t := time.Duration(d.Duration)
	if t%time.Second != 0 || t/time.Second > 1<<31-1 {
		return 0, usageError(fmt.Errorf("%s must be whole seconds, and less than 68 years", flag))
	}
	return int32(t / time.Second), nil
}

const (
	outputTable = "table"
	outputJSON  = "json"
	outputYAML  = "yaml"
)

// outputFlag gives a command -o; more are formats that only it has.
func (a *app) outputFlag(cmd *cobra.Command, more ...string) {
	c := &choice{&a.output, append([]string{outputTable, outputJSON, outputYAML}, more...)}
	cmd.Flags().VarP(c, "output", "o", "`FORMAT` of the output: "+strings.Join(c.choices, ", "))
	_ = cmd.RegisterFlagCompletionFunc("output", c.complete) // fails only for a flag that does not exist
}

// print writes data in the format that -o names; forPeople writes the table.
func (a *app) print(data any, forPeople func(w io.Writer)) error {
	switch a.output {
	case outputJSON, outputYAML:
		return encode(a.out, a.output, data)
	}
	var b strings.Builder
	forPeople(&b)
	_, err := io.WriteString(a.out, b.String())
	return err
}

// encode writes data as JSON or YAML, with the same names in both.
func encode(w io.Writer, format string, data any) error {
	text, err := json.MarshalIndent(data, "", "  ")
	if err != nil {
		return fmt.Errorf("encode output: %w", err)
	}
	text = append(text, '\n')
	if format == outputYAML {
		if text, err = yaml.JSONToYAML(text); err != nil {
			return fmt.Errorf("encode output: %w", err)
		}
	}
	_, err = w.Write(text)
	return err
}

// timestamp is a time of the contracts in output: RFC 3339 in UTC, null for
// never.
func timestamp(unix int64) *time.Time {
	if unix == 0 {
		return nil
	}
	t := time.Unix(unix, 0).UTC()
	return &t
}

// remark writes one of a command's remarks to the standard error.
func (a *app) remark(format string, args ...any) {
	fmt.Fprintln(a.err, a.errStyle.dim(fmt.Sprintf(format, args...)))
}
