package cli

import (
	"github.com/spf13/cobra"
)

// schemaCommand prints the JSON Schema of a program's configuration.
func (a *app) schemaCommand(program string, schema []byte) *cobra.Command {
	return &cobra.Command{
		Use:   "schema",
		Short: "print the JSON Schema of the configuration",
		Long: "Schema prints the JSON Schema (draft 2020-12) of the configuration file, for editors\n" +
			"that complete and check it, and for checks before it is installed. \"validate\" finds\n" +
			"all that this finds, and more.",
		Example: "  hallmark " + program + " schema > " + program + ".schema.json",
		Args:    noArguments,
		RunE: func(*cobra.Command, []string) error {
			_, err := a.out.Write(schema)
			return err
		},
	}
}
