// Command sdk calls OpenAI with OpenAI's Go SDK, configured only by the
// environment, as an agent under openai-broker does. It is a separate module, since
// neither the engine nor the broker depends on the SDK.
package main

import (
	"bytes"
	"context"
	"fmt"
	"os"

	"github.com/openai/openai-go/v3"
	"github.com/openai/openai-go/v3/responses"
)

func main() {
	if err := run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "sdk:", err)
		os.Exit(1)
	}
	fmt.Println("models, response, stream and upload: all answered")
}

func run(ctx context.Context) error {
	client := openai.NewClient()
	models, err := client.Models.List(ctx)
	if err != nil || len(models.Data) == 0 {
		return fmt.Errorf("list models: %v: %w", models, err)
	}
	params := responses.ResponseNewParams{
		Model: models.Data[0].ID,
		Input: responses.ResponseNewParamsInputUnion{OfString: openai.String("hello")},
	}
	response, err := client.Responses.New(ctx, params)
	if err != nil || response.OutputText() == "" {
		return fmt.Errorf("create a response: %w", err)
	}
	stream := client.Responses.NewStreaming(ctx, params)
	events := 0
	for stream.Next() {
		events++
	}
	if err := stream.Err(); err != nil || events < 2 {
		return fmt.Errorf("stream a response: %d events: %w", events, err)
	}
	file, err := client.Files.New(ctx, openai.FileNewParams{
		File: openai.File(bytes.NewReader(make([]byte, 5<<20)), "data.bin", "application/octet-stream"), Purpose: openai.FilePurposeUserData,
	})
	if err != nil || file.Bytes < 5<<20 {
		return fmt.Errorf("upload a file: %w", err)
	}
	return nil
}
