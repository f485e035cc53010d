// This file owns the inference API, as far as needed to check what a key may do. Bodies
// must only be JSON, since no test here is about models.

package openaitest

import (
	"encoding/json"
	"net/http"
)

// defaultModel is the model in the answer to a request without one.
const defaultModel = "gpt-5-mini"

// models is encoded once, because tests in simulated time read it most.
var models = func() answer {
	model := func(id string) object {
		return object{"id": id, "object": "model", "created": int64(1_754_425_777), "owned_by": "system"}
	}
	list := ok(object{"object": "list", "data": []object{model(defaultModel), model("text-embedding-3-small")}})
	list.encoded = list.encode()
	return list
}()

func (s *Server) listModels(*call) answer { return models }

func (c *call) model() (string, *answer) {
	var body struct {
		Model string `json:"model"`
	}
	if len(c.body) > 0 && json.Unmarshal(c.body, &body) != nil {
		ans := fail(http.StatusBadRequest, "invalid_json", "", "We could not parse the JSON body of your request.")
		return "", &ans
	}
	if body.Model == "" {
		body.Model = defaultModel
	}
	return body.Model, nil
}

func (s *Server) createResponse(c *call) answer {
	model, bad := c.model()
	if bad != nil {
		return *bad
	}
	s.charge(c, "completions", model, 8, 5)
	return answer{status: http.StatusOK, stream: c.streamed(), body: object{
		"id":         "resp_" + randomHex(24),
		"object":     "response",
		"created_at": c.now.Unix(),
		"status":     "completed",
		"model":      model,
		"error":      nil,
		"output": []object{{
			"type":   "message",
			"id":     "msg_" + randomHex(24),
			"status": "completed",
			"role":   "assistant",
			"content": []object{{
				"type": "output_text", "text": "Hello from the simulator.", "annotations": []object{},
			}},
		}},
		"usage": object{"input_tokens": 8, "output_tokens": 5, "total_tokens": 13},
	}}
}

func (s *Server) createChatCompletion(c *call) answer {
	model, bad := c.model()
	if bad != nil {
		return *bad
	}
	s.charge(c, "completions", model, 8, 5)
	return ok(object{
		"id":      "chatcmpl-" + alnum(29),
		"object":  "chat.completion",
		"created": c.now.Unix(),
		"model":   model,
		"choices": []object{{
			"index":         0,
			"message":       object{"role": "assistant", "content": "Hello from the simulator.", "refusal": nil},
			"finish_reason": "stop",
		}},
		"usage": object{"prompt_tokens": 8, "completion_tokens": 5, "total_tokens": 13},
	})
}

func (s *Server) createEmbedding(c *call) answer {
	model, bad := c.model()
	if bad != nil {
		return *bad
	}
	s.charge(c, "embeddings", model, 8, 0)
	return ok(object{
		"object": "list",
		"data":   []object{{"object": "embedding", "index": 0, "embedding": []float64{0.25, -0.5, 0.75}}},
		"model":  model,
		"usage":  object{"prompt_tokens": 8, "total_tokens": 8},
	})
}
